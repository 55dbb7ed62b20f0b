"""Keys and texts that change what a row means: obeyed, refused with the way out, or named."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qwlit.data.conversation import Message, ToolCall
from qwlit.data.encoded_batch import EncodedBatch
from qwlit.data.formats import RowParser
from qwlit.data.remarks import (
    BARE_TOOLS,
    CONSECUTIVE_ANSWERS,
    CONTROL_TOKENS_AS_TEXT,
    MARKED_QUESTION,
    NO_EMPTY_BLOCK,
    PLACEHOLDER_AS_TEXT,
    TAGS_AS_TEXT,
)
from qwlit.data.rows import Document, Row
from qwlit.data.tokenizer import TextTokenizer
from qwlit.data.unread import MAX_NAMED, OTHER_KEYS, add_remarks
from tests.formats import csv_bytes, parquet_bytes
from tests.real_tokenizer import small_tokenizer
from tests.stores import build, row_encoder
from tests.unit.test_formats import parse, refused

CASES = Path(__file__).parent.parent / "cases"
USER = {"role": "user", "content": "2+2?"}
FOUR = {"role": "assistant", "content": "Four."}
CHAT = {"messages": [USER, FOUR]}
PAIR = {"prompt": "2+2?", "completion": "Four."}
HUMAN = {"from": "human", "value": "2+2?"}
GPT = {"from": "gpt", "value": "Four."}
TURNS = {"conversations": [HUMAN, GPT]}
ALPACA = {"instruction": "2+2?", "output": "Four."}


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(small_tokenizer("qwen3", extra=["<think>", "</think>", "<tool_call>", "<|fim_prefix|>"]))


def case(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (CASES / name).read_text(encoding="utf-8").splitlines()]


def encode(tokenizer: TextTokenizer, *rows: Any, **config: Any) -> EncodedBatch:
    return row_encoder(tokenizer, **config)([Row(0, line, row) for line, row in enumerate(rows, start=1)])


def supervised(messages: tuple[Message, ...]) -> list[bool]:
    return [message.is_supervised for message in messages if message.role == "assistant"]


def test_answers_marked_as_unwanted_are_refused_with_the_way_out() -> None:
    rows = case("rows_kto.jsonl")
    assert parse(rows.pop(1)).messages[1].content == "Four."
    for row in rows:
        assert "marked as unwanted" in (reason := refused(row)) and "remove such rows" in reason


@pytest.mark.parametrize("key", ["label", "kto_tag"])
@pytest.mark.parametrize("row", [CHAT, PAIR, TURNS, ALPACA])
def test_a_label_is_obeyed_in_every_format_and_spelling(
    row: dict[str, Any], key: str, tokenizer: TextTokenizer
) -> None:
    for no in (False, "false", "False", " FALSE ", 0, 0.0, "0"):
        assert f"'{key}' is false" in refused(row | {key: no})
    for yes in (True, "true", "TRUE", 1, 1.0, "1", None, ""):
        assert parse(row | {key: yes}) == parse(row)
        assert not encode(tokenizer, row | {key: yes}).remarks
    for other in (3, "positive", ["a"], 0.5, -1, float("nan")):
        assert parse(row | {key: other}) == parse(row)
        assert encode(tokenizer, row | {key: other}).remarks == {f"a row key that is not read: '{key}'": 1}


def test_a_documents_label_0_is_a_class_and_only_false_marks_it_as_unwanted(tokenizer: TextTokenizer) -> None:
    assert encode(tokenizer, {"text": "x", "label": 0}).remarks == {"a row key that is not read: 'label'": 1}
    assert "'label' is false" in refused({"text": "x", "label": False})


def test_preference_rows_are_refused_with_the_way_out() -> None:
    for row in case("rows_preference.jsonl"):
        assert "preference row" in (reason := refused(row)) and "keep the wanted answer" in reason


@pytest.mark.parametrize("row", [CHAT, PAIR, TURNS, ALPACA, {"prompt": "2+2?"}, {"text": "x"}, {}])
@pytest.mark.parametrize("key", ["chosen", "rejected", "rejected_response", "rejected_messages", "chosen_response"])
def test_a_second_answer_under_any_key_makes_a_preference_row(row: dict[str, Any], key: str) -> None:
    for value in ("Five.", [{"role": "assistant", "content": "Five."}], {"from": "gpt", "value": "Five."}, True):
        assert f"preference row ('{key}')" in refused(row | {key: value})
    for value in (None, "", [], {}, [None], {"content": None}):
        if row and row != {"prompt": "2+2?"}:
            assert parse(row | {key: value}) == parse(row)


def test_an_answer_that_was_not_chosen_is_unwanted_and_one_that_was_not_rejected_is_not() -> None:
    assert "'chosen' is false" in refused(CHAT | {"chosen": False})
    assert parse(CHAT | {"rejected": False}) == parse(CHAT)


def test_rows_with_images_are_refused_with_the_way_out() -> None:
    for row in case("rows_images.jsonl"):
        for one in (row, {key: value for key, value in row.items() if not key.startswith("image")}):
            assert "training reads only text" in (reason := refused(one)) and "remove such rows" in reason


@pytest.mark.parametrize("key", ["images", "image", "videos", "video", "audios", "audio"])
def test_media_of_a_row_or_a_message_are_refused_but_empty_ones(key: str) -> None:
    for value in ("a.jpg", ["a.jpg"], {"bytes": b"x", "path": None}, [{"bytes": None, "path": "a.jpg"}]):
        assert f"has '{key}'" in refused(CHAT | {key: value})
        assert f"message 1: has '{key}'" in refused({"messages": [USER | {key: value}, FOUR]})
        assert f"turn 1: has '{key}'" in refused({"conversations": [HUMAN | {key: value}, GPT]})
    for value in (None, "", [], "[]", {"bytes": b"", "path": None}, [{"path": ""}]):
        assert parse(CHAT | {key: value}) == parse(CHAT)
        assert RowParser("auto", 10, "assistant").unread_keys(CHAT | {key: value}) == []


@pytest.mark.parametrize("tag", ["<image>", "<video>", "<audio>", "<image 1>", "<image_2>"])
def test_a_placeholder_at_an_end_of_what_is_asked_is_refused_and_elsewhere_named(
    tag: str, tokenizer: TextTokenizer
) -> None:
    for text in (tag, f"{tag}What is this?", f" \n{tag}\nWhat?", f"What is this?\n{tag} "):
        for row in (
            {"messages": [USER | {"content": text}, FOUR]},
            {"messages": [{"role": "system", "content": text}, USER, FOUR]},
            CHAT | {"system": text},
            {"conversations": [HUMAN | {"value": text}, GPT]},
            PAIR | {"prompt": text},
            ALPACA | {"instruction": text},
        ):
            assert f"{tag} is a placeholder for something that is not text" in refused(row)
    asked = {"messages": [USER | {"content": f"Explain {tag} in HTML."}, FOUR]}
    inside = [
        {"messages": [USER, FOUR | {"content": f"{tag} opens it."}]},
        {"text": f"{tag} opens it."},
        Document(f"{tag} opens it."),
    ]
    if "image" in tag:
        assert f"{tag} is a placeholder for something that is not text" in refused(asked), "<image> is no HTML"
    else:
        inside.append(asked)
    assert encode(tokenizer, *inside).remarks == {PLACEHOLDER_AS_TEXT: len(inside)}
    html = [{"messages": [USER | {"content": text}, FOUR]} for text in ("<image/>", "<imagery>", "<img>", "image>")]
    assert not encode(tokenizer, *html).remarks


def test_marks_of_sharegpt_turns_are_obeyed(tokenizer: TextTokenizer) -> None:
    rows = case("rows_weight.jsonl")
    assert [supervised(parse(row).messages) for row in rows] == [[False, True]] * 2
    assert not encode(tokenizer, *rows, loss_on="all").remarks
    batch = encode(tokenizer, *rows)
    plain = encode(
        tokenizer, {"conversations": [{k: t[k] for k in ("from", "value")} for t in rows[0]["conversations"]]}
    )
    assert batch.arrays["num_supervised"][0] < plain.arrays["num_supervised"][0]
    # Both answers were supervised; the one left is an answer and its end.
    last = encode(tokenizer, *rows, loss_on="last_assistant")
    assert batch.arrays["mask"].tolist() == last.arrays["mask"].tolist()


@pytest.mark.parametrize("key", ["weight", "loss", "train", "loss_weight"])
def test_each_mark_is_obeyed_on_messages_and_turns_alike(key: str) -> None:
    for value, expected in (
        (0, False),
        (0.0, False),
        (False, False),
        (1, True),
        (1.0, True),
        (True, True),
        (None, True),
    ):
        for row in ({"messages": [USER, FOUR | {key: value}]}, {"conversations": [HUMAN, GPT | {key: value}]}):
            assert supervised(parse(row).messages) == [expected]
    for value in (0.5, "maybe", 2, -1, [], "0", float("nan")):
        for row in ({"messages": [USER, FOUR | {key: value}]}, {"conversations": [HUMAN, GPT | {key: value}]}):
            assert f"2: '{key}' must be 0 or false (read, not supervised) or 1 or true (supervised)" in refused(row)


def test_marks_that_disagree_are_refused() -> None:
    for row in (
        {"messages": [USER, FOUR | {"weight": 0, "train": True}]},
        {"conversations": [HUMAN, GPT | {"loss": False, "loss_weight": 1.0}]},
    ):
        assert "disagree on whether it is supervised; keep one" in refused(row)
    assert supervised(parse({"messages": [USER, FOUR | {"weight": 0, "train": False}]}).messages) == [False]


def test_a_mark_to_supervise_a_question_is_named_and_obeyed_where_everything_is_supervised(
    tokenizer: TextTokenizer,
) -> None:
    row = {"messages": [USER | {"weight": 1}, FOUR]}
    assert encode(tokenizer, row).remarks == {MARKED_QUESTION: 1}
    assert not encode(tokenizer, row, loss_on="all").remarks
    assert not encode(tokenizer, {"messages": [USER | {"weight": 0}, FOUR | {"weight": 1}]}).remarks


def test_with_loss_on_all_a_turn_marked_otherwise_is_still_not_supervised(tokenizer: TextTokenizer) -> None:
    batch = encode(tokenizer, {"messages": [USER | {"train": False}, FOUR]}, CHAT, loss_on="all")
    marked, whole = batch.arrays["num_supervised"].tolist()
    turn = len(tokenizer.encode(["user\n2+2?"])[0]) + 2  # opened and closed; the first token is nobody's target
    assert whole - marked == turn + len(tokenizer.encode(["\n"])[0]) - 1


def test_a_system_column_and_a_system_turn_are_one_or_refused() -> None:
    same, other = case("rows_two_systems.jsonl")
    assert [m.role for m in parse(same).messages] == ["system", "user", "assistant"]
    assert "has a 'system' column and a system turn that differ; keep one" in refused(other)
    prompt = {
        "prompt": [{"role": "developer", "content": "Be brief."}, USER],
        "completion": "Four.",
        "system": "Be kind.",
    }
    assert "system turn that differ" in refused(prompt)
    assert len(parse(prompt | {"system": "Be brief.\n"}).messages) == 3


CALL = {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'}
ADD = ToolCall("add", {"a": 1})


def test_a_text_before_a_call_and_calls_in_a_row_are_one_answer(tokenizer: TextTokenizer) -> None:
    (row,) = case("rows_call_after_text.jsonl")
    conversation = parse(row)
    assert conversation.messages[1] == Message(
        "assistant", "Let me look.", None, (ToolCall("weather", {"city": "Rome"}),)
    )
    as_messages = {
        "messages": [
            {"role": "user", "content": "Weather in Rome?"},
            {
                "role": "assistant",
                "content": "Let me look.",
                "tool_calls": [json.loads(row["conversations"][2]["value"])],
            },
            {"role": "tool", "content": "sunny"},
            {"role": "assistant", "content": "Sunny."},
        ],
        "tools": [{"type": "function", "function": json.loads(row["tools"])[0]}],
    }
    batch = encode(tokenizer, row, as_messages)
    tokens = batch.arrays["tokens"].reshape(2, -1)
    assert (tokens[0] == tokens[1]).all()
    assert batch.remarks == {BARE_TOOLS: 1, NO_EMPTY_BLOCK: 2}
    for turns, calls in (([HUMAN, CALL, CALL], (ADD, ADD)), ([HUMAN, GPT, CALL, CALL, CALL], (ADD,) * 3)):
        (answer,) = parse({"conversations": turns}).messages[1:]
        assert (answer.content, answer.tool_calls) == ("Four." if GPT in turns else "", calls)
    # An answer after a call is a message of its own.
    assert [m.content for m in parse({"conversations": [HUMAN, CALL, GPT]}).messages] == ["2+2?", "", "Four."]


def test_marks_of_one_answer_in_several_turns_must_agree() -> None:
    for first, second in ((0, 1), (1, 0), (0, None), (None, 0)):
        row = {"conversations": [HUMAN, GPT | {"weight": first}, CALL | {"weight": second}]}
        assert "message 3: belongs to the answer before it, but its mark differs" in refused(row)
    for first, second in ((0, 0), (1, 1), (1, None), (None, 1)):
        row = {"conversations": [HUMAN, GPT | {"weight": first}, CALL | {"weight": second}]}
        assert supervised(parse(row).messages) == [first != 0]


def test_parts_with_value_are_texts(tokenizer: TextTokenizer) -> None:
    (row,) = case("rows_value_parts.jsonl")
    assert [m.content for m in parse(row).messages] == ["hi", "Hello!"]
    assert not encode(tokenizer, row).remarks
    both = [{"type": "text", "text": "hi", "value": "ho"}]
    assert "'text' and 'value' that differ" in refused({"messages": [USER | {"content": both}, FOUR]})
    cached = [{"type": "text", "text": "hi", "value": "hi", "cache_control": {"type": "ephemeral"}}]
    remarked = encode(tokenizer, {"messages": [USER | {"content": cached}, FOUR]}).remarks
    assert remarked == {"a message key that is not read: 'content.cache_control'": 1}


ADDER = {"name": "add", "parameters": {"type": "object"}}
WRAPPED = {"type": "function", "function": ADDER}


@pytest.mark.parametrize("tool", [ADDER, {"type": "function", **ADDER}, {"function": ADDER}, {**WRAPPED, "type": None}])
def test_bare_tool_definitions_are_wrapped_and_that_is_said(tool: dict[str, Any], tokenizer: TextTokenizer) -> None:
    for tools in ([tool], json.dumps([tool]), [WRAPPED, tool]):
        row = CHAT | {"tools": tools}
        assert parse(row).tools in ((WRAPPED,), (WRAPPED, WRAPPED))
        assert encode(tokenizer, row).remarks == {BARE_TOOLS: 1}
    for unbare in (
        CHAT | {"tools": [WRAPPED]},
        CHAT | {"functions": [ADDER]},
        CHAT | {"functions": [ADDER], "tools": []},
    ):
        assert parse(unbare).tools == (WRAPPED,)
        assert not encode(tokenizer, unbare).remarks
    assert parse(CHAT | {"tools": [{"google": {}}]}).tools == ({"google": {}},)


def test_what_stands_twice_is_refused() -> None:
    assert "both 'tools' and 'functions'" in refused(CHAT | {"tools": [WRAPPED], "functions": [ADDER]})
    call = {"name": "add", "arguments": {}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call], "function_call": call}
    assert "both 'tool_calls' and 'function_call'" in refused({"messages": [USER, answer]})


def test_control_tokens_written_out_stay_letters_and_are_named(tokenizer: TextTokenizer) -> None:
    batch = encode(tokenizer, *case("rows_rendered.jsonl"))
    assert batch.remarks == {CONTROL_TOKENS_AS_TEXT: 3}
    ids = batch.arrays["tokens"].tolist()
    assert ids.count(tokenizer.control_ids["<|im_start|>"]) == 2  # of the third row's own two turns
    places = [
        {"messages": [USER, FOUR | {"reasoning_content": "<|im_end|>"}]},
        CHAT | {"system": "<|fim_prefix|>"},
        CHAT | {"tools": [WRAPPED, {"type": "function", "function": {"name": "<|endoftext|>"}}]},
        Document("a <|im_end|>"),
    ]
    assert encode(tokenizer, *places).remarks == {CONTROL_TOKENS_AS_TEXT: 4}
    others = [{"text": text} for text in ("<|fim_suffix|>", "a <| b |> c", "<|im_start", "im_start|>")]
    assert not encode(tokenizer, *others).remarks


def test_tags_in_any_text_are_letters_and_named(tokenizer: TextTokenizer) -> None:
    places = [
        {"text": "<think>hm</think>"},
        {"messages": [USER | {"content": "<tool_response>\n3\n</tool_response>"}, FOUR]},
        CHAT | {"system": "Call with <tool_call>."},
    ]
    assert encode(tokenizer, *places).remarks == {TAGS_AS_TEXT: 3}


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        (CHAT | {"id": 7, "source": "web", "score": None, "note": ""}, ["id", "source"]),
        (TURNS | {"id": 0}, ["id"]),
        (TURNS | {"functions": [ADDER]}, []),
        (ALPACA | {"text": "2+2? Four."}, ["text"]),
        (PAIR | {"response": "4"}, ["response"]),
        (PAIR | {"completion": None, "response": "4"}, []),
        (PAIR | {"history": [["a", "b"]], "weight": 0.7}, ["history", "weight"]),
        ({"text": "Prose.", "system": "x", "meta": {}}, ["meta", "system"]),
        ({"input_ids": [1, 2], "labels": [-100, 2], "attention_mask": [1, 1]}, ["attention_mask"]),
        (CHAT | ALPACA, ["instruction", "output"]),
    ],
)
def test_every_key_of_a_row_that_its_format_does_not_read_is_named(
    row: dict[str, Any], unread: list[str], tokenizer: TextTokenizer
) -> None:
    for content in (row, json.dumps(row).encode()):
        batch = encode(tokenizer, content)
        assert batch.remarks == {f"a row key that is not read: '{key}'": 1 for key in unread}


def test_what_is_not_read_follows_the_format_set(tokenizer: TextTokenizer) -> None:
    row = {"text": "Prose."} | CHAT
    assert encode(tokenizer, row, format="text").remarks == {"a row key that is not read: 'messages'": 1}
    assert encode(tokenizer, row).remarks == {"a row key that is not read: 'text'": 1}


def test_every_key_of_a_turn_that_is_not_read_is_named(tokenizer: TextTokenizer) -> None:
    rows = [
        {"conversations": [HUMAN | {"mood": "glad", "none": None}, GPT | {"reasoning_content": "hm"}]},
        {"messages": [USER | {"mood": "glad"}, FOUR | {"label": 3}]},
    ]
    named = {"mood": 2, "reasoning_content": 1, "label": 1}
    assert encode(tokenizer, *rows).remarks == {f"a message key that is not read: '{k}'": n for k, n in named.items()}
    assert "message 2: 'label' is false" in refused({"messages": [USER, FOUR | {"label": False}]})


def test_columns_of_tables_that_are_not_read_are_named(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    rows = [
        PAIR | {"id": 1, "label": True, "text": "x", "empty": None, "tags": {"a": [1]}},
        PAIR | {"id": 2, "label": False, "text": None, "empty": None, "tags": {"a": []}},
    ]
    expected = {"id": 1, "tags": 1, "text": 1}
    for kind, content in (("csv", csv_bytes(rows)), ("parquet", parquet_bytes(rows))):
        (path := tmp_path / f"rows.{kind}").write_bytes(content)
        store = build(path, tokenizer)
        assert store.remarks == {f"a row key that is not read: '{key}'": n for key, n in expected.items()}, kind
        assert [row["line"] for row in store.quarantine()] == [2 if kind == "parquet" else 3]


def test_columns_of_parquet_that_change_the_meaning_are_read(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    rows = [CHAT | more for more in ({"rejected": "x"}, {"kto_tag": False}, {"images": ["a"]}, {})]
    keys = {key for row in rows for key in row}
    (tmp_path / "rows.parquet").write_bytes(parquet_bytes([dict.fromkeys(keys) | row for row in rows]))
    store = build(tmp_path / "rows.parquet", tokenizer)
    assert [row["line"] for row in store.quarantine()] == [1, 2, 3]


def test_any_number_of_unread_keys_makes_few_remarks(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    rows = [CHAT | {f"{'k' * 99}{number}": 1, f"key{number}": 1, "\n\x1b[31m": 2} for number in range(300)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "wide.jsonl").write_text(json.dumps(CHAT | {f"key{number}": 1 for number in range(9000)}))
    wide = parquet_bytes([CHAT | {f"key{number}": 1 for number in range(200)}] * 2)
    (tmp_path / "wide.parquet").write_bytes(wide)
    for name, number in (("rows.jsonl", 300), ("wide.jsonl", 1), ("wide.parquet", 2)):
        remarks = build(tmp_path / name, tokenizer).remarks
        assert len(remarks) == MAX_NAMED + 1, name
        assert 0 < remarks[OTHER_KEYS] <= number
        assert all(len(text) < 100 and len(text.splitlines()) == 1 for text in remarks)


def test_remarks_of_batches_add_up_and_only_key_names_are_limited() -> None:
    total: Counter[str] = Counter()
    for number in range(50):
        add_remarks(total, Counter({f"a row key that is not read: 'k{number}'": 2, f"other {number}": 1}))
    add_remarks(total, Counter({"a row key that is not read: 'k3'": 5}))
    assert total["a row key that is not read: 'k3'"] == 7
    assert total[OTHER_KEYS] == 2 * (50 - MAX_NAMED)
    assert sum(text.startswith("other") for text in total) == 50


@pytest.mark.parametrize("text", ["look at <image> and say", "<img>https://a/b.png</img>\nWhat?", "What is <IMAGE>?"])
def test_a_placeholder_for_a_picture_is_refused_wherever_it_stands(text: str) -> None:
    assert "is a placeholder for something that is not text" in refused({"messages": [USER | {"content": text}, FOUR]})
    assert "is a placeholder for something that is not text" in refused(ALPACA | {"instruction": text, "input": "x"})


@pytest.mark.parametrize("key", ["image_path", "image_url", "video_path", "audio_url", "pixel_values"])
def test_other_keys_of_pictures_and_sound_are_refused(key: str) -> None:
    assert f"has '{key}'" in refused(CHAT | {key: "a.png"})


@pytest.mark.parametrize("row", [CHAT, ALPACA, PAIR])
def test_a_row_that_is_marked_as_not_to_be_trained_on_is_refused(row: dict[str, Any]) -> None:
    for key in ("weight", "loss", "train", "loss_weight"):
        for value in (0, 0.0, False, "false"):
            assert f"'{key}' is {value}: the row is marked as not to be trained on" in refused(row | {key: value})
        assert RowParser("auto", 10, "assistant").unread_keys(row | {key: True}) == []
        assert RowParser("auto", 10, "assistant").unread_keys(row | {key: 0.7}) == [key]


def test_an_answer_and_the_calls_after_it_are_one_turn_in_messages_too() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    calls = {"role": "assistant", "content": None, "tool_calls": [call]}
    messages = [USER, FOUR | {"content": "Let me see."}, calls, calls, {"role": "tool", "content": "1"}, FOUR]
    parsed = parse({"messages": messages}).messages
    assert [(m.role, m.content, len(m.tool_calls)) for m in parsed] == [
        ("user", USER["content"], 0),
        ("assistant", "Let me see.", 2),
        ("tool", "1", 0),
        ("assistant", FOUR["content"], 0),
    ]


def test_answers_directly_after_one_another_are_named(tokenizer: TextTokenizer) -> None:
    assert encode(tokenizer, {"messages": [USER, FOUR, FOUR]}).remarks[CONSECUTIVE_ANSWERS] == 1
