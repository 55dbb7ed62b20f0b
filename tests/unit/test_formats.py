import json
from typing import Any

import pytest

from qwlit.data.conversation import Conversation, Message, ToolCall
from qwlit.data.formats import REQUIRED_KEYS, EncodedSample, RowParser, recognise_format
from qwlit.data.rows import Document, RowError

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Eins."},
    {"role": "user", "content": "And\ntwo?"},
    {"role": "assistant", "content": "<think>hm</think>二"},
]
TOOLS = [{"name": "add", "parameters": {"a": "Zahl"}}]
USER, ANSWER = MESSAGES[1:3]
SHAREGPT_NAMES = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
SHAREGPT = [{"from": SHAREGPT_NAMES[m["role"]], "value": m["content"]} for m in MESSAGES]
PAIR = {"instruction": "One?", "output": "Eins."}


def parse(row: Any, row_format: Any = "auto", *, loss_on: Any = "assistant", vocab_size: int = 10) -> Any:
    return RowParser(row_format, vocab_size, loss_on)(row)


def refused(row: Any, row_format: Any = "auto", *, loss_on: Any = "assistant") -> str:
    with pytest.raises(RowError) as raised:
        parse(row, row_format, loss_on=loss_on)
    assert len(str(raised.value)) < 500
    return str(raised.value)


SAME = {
    "messages": [{"messages": MESSAGES}],
    "sharegpt": [
        {"conversations": SHAREGPT},
        {"conversations": SHAREGPT[1:], "system": "Be brief."},
        {"conversations": MESSAGES},
        {"conversations": MESSAGES[1:], "system": "Be brief."},
    ],
    "alpaca": [
        {
            "instruction": "And",
            "input": "two?",
            "output": MESSAGES[4]["content"],
            "history": [["One?", "Eins."]],
            "system": "Be brief.",
        },
        {
            "instruction": "",
            "input": "And\ntwo?",
            "output": MESSAGES[4]["content"],
            "history": '[["One?", "Eins."]]',
            "system": "Be brief.",
        },
    ],
    "prompt_completion": [
        {"prompt": MESSAGES[:4], "completion": MESSAGES[4:]},
        {"prompt": MESSAGES[1:4], "response": MESSAGES[4]["content"], "system": "Be brief."},
        {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
    ],
}


@pytest.mark.parametrize(("name", "row"), [(name, row) for name, rows in SAME.items() for row in rows])
def test_the_same_conversation_is_the_same_in_every_format(name: str, row: dict[str, Any]) -> None:
    wrapped = tuple({"type": "function", "function": tool} for tool in TOOLS)
    expected = Conversation(tuple(Message(m["role"], m["content"]) for m in MESSAGES), wrapped)
    for tools in (TOOLS, json.dumps(TOOLS)):
        assert parse(row | {"tools": tools}) == parse(row | {"tools": tools}, name) == expected
    assert recognise_format(row) == name


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ANSWER]},
        {"conversations": [{"from": "user", "value": "One?"}, {"from": "model", "value": "Eins."}], "system": ""},
        PAIR,
        PAIR | {"input": "", "history": None, "system": None},
        PAIR | {"input": None, "history": [], "system": ""},
        {"prompt": "One?", "completion": "Eins."},
        {"prompt": "One?", "response": "Eins.", "completion": None},
        {"prompt": [USER], "completion": "Eins."},
    ],
)
def test_the_short_form_of_each_format_is_question_and_answer(row: dict[str, Any]) -> None:
    assert parse(row) == Conversation((Message("user", "One?"), Message("assistant", "Eins.")))


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_json_texts_in_the_cells_of_a_table_are_read(key: str) -> None:
    turns = MESSAGES if key == "messages" else SHAREGPT
    row = {key: json.dumps(turns), "tools": json.dumps(TOOLS), "system": ""}
    assert parse(row) == parse({key: turns, "tools": TOOLS})
    assert parse(row | {"tools": ""}) == parse({key: turns})
    assert "is a text, but not valid JSON" in refused({key: "[{"})


def test_numbers_in_the_cells_of_a_table_are_read() -> None:
    row = {"input_ids": "[4, 5, 6]", "loss_mask": "[0, 0, 1]"}
    assert parse(row) == EncodedSample([4, 5, 6], [0, 0, 1])
    assert parse(row | {"loss_mask": "", "labels": "[-100, 5, -100]"}) == EncodedSample([4, 5, 6], [0, 1, 0])


def test_sharegpt_calls_functions_and_observes_what_they_say() -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    for speaker, said in (("function_call", call), ("tool_call", [call])):
        turns = [SHAREGPT[1], {"from": speaker, "value": json.dumps(said)}, {"from": "observation", "value": "2"}]
        assert parse({"conversations": [*turns, SHAREGPT[2]]}).messages == (
            Message("user", "One?"),
            Message("assistant", "", None, (ToolCall("add", {"a": 1}),)),
            Message("tool", "2"),
            Message("assistant", "Eins."),
        )


def test_text_is_a_document() -> None:
    assert parse({"text": " 二\n", "id": 3}) == Document(" 二\n")
    block = Document("x", is_first=False)
    assert parse(block) is parse(block, "text") is block


def test_tokenized_rows_by_labels_and_by_mask_are_the_same_sample() -> None:
    expected = EncodedSample([4, 5, 6], [0, 0, 1])
    assert parse({"input_ids": [4, 5, 6], "labels": [-100, -100, 6]}) == expected
    assert parse({"input_ids": [4, 5, 6], "loss_mask": [0, 0, 1]}, "tokenized") == expected
    assert parse({"input_ids": [4, 5, 6], "loss_mask": [0, 0, 1], "labels": None}, loss_on="all") == expected


def test_input_ids_alone_are_supervised_whole_with_loss_on_all_and_only_then() -> None:
    row = {"input_ids": [4, 5, 6], "attention_mask": [1, 1, 1]}
    assert parse(row, loss_on="all") == EncodedSample([4, 5, 6], [0, 1, 1])
    assert "data.loss_on=all" in refused(row)
    assert "data.loss_on=all" in refused(row, loss_on="last_assistant")
    assert "without 'labels' or 'loss_mask'" in refused(row | {"labels": None}, loss_on="all")


def test_the_first_token_is_never_supervised() -> None:
    for key, value in {"labels": [4, 5], "loss_mask": [1, 1]}.items():
        assert parse({"input_ids": [4, 5], key: value}) == EncodedSample([4, 5], [0, 1])


FILLED: dict[str, dict[str, Any]] = {
    "messages": {"messages": [USER, ANSWER]},
    "sharegpt": {"conversations": SHAREGPT},
    "tokenized": {"input_ids": [4, 5], "loss_mask": [0, 1]},
    "alpaca": PAIR,
    "prompt_completion": {"prompt": "One?", "completion": "Eins."},
    "text": {"text": "Prose."},
}


def test_a_row_with_the_keys_of_several_formats_is_the_first_one_that_has_values() -> None:
    assert list(FILLED) == list(REQUIRED_KEYS)
    names = list(FILLED)
    for number, name in enumerate(names):
        later = {key: value for other in names[number:] for key, value in FILLED[other].items()}
        nulls = {key: None for other in names[:number] for key in FILLED[other]}
        assert recognise_format(later) == recognise_format(nulls | later) == name
    assert recognise_format({"messages": None}) == "messages"
    assert recognise_format({"prompt": "One?"}) is recognise_format({}) is None


@pytest.mark.parametrize("name", FILLED)
def test_a_set_format_reads_its_own_keys_whatever_else_there_is(name: Any) -> None:
    everything = {key: value for row in FILLED.values() for key, value in row.items()}
    assert parse(everything, name) == parse(FILLED[name])


@pytest.mark.parametrize("name", FILLED)
def test_a_set_format_refuses_rows_without_its_keys(name: Any) -> None:
    for other in FILLED.keys() - {name}:
        reason = refused(FILLED[other], name)
        assert reason.startswith(f"data.format={name} needs '")
        assert reason.endswith(f"this row looks like {other}")
    assert "this row looks like text" not in refused({"id": 1}, name)


@pytest.mark.parametrize("name", [name for name in FILLED if name != "text"])
def test_prose_is_refused_where_another_format_is_set(name: Any) -> None:
    assert "this row looks like text" in refused(Document("Es war einmal."), name)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "unknown format: keys none; expected 'messages', or 'conversations'"),
        ({"prompt": "a", "answer": "b"}, "unknown format: keys 'prompt', 'answer'"),
        ({"问题": "a", "答案": "b"}, 'set "data.columns={prompt: 问题, completion: 答案}"; expected'),
        ({"id": 7, "the question": "a", "a.b": "b"}, "data.columns={prompt: 'the question', completion: 'a.b'}"),
        ({"query": "a", "response": "b"}, 'set "data.columns={prompt: query}"; expected'),
        (
            {"instruction": "a", "input": "b", "answer": "c"},
            'name its column: "data.columns={output: COLUMN}"; expected',
        ),
        ({"prompt": "a", "answer": "b", "c": "d"}, 'set "data.columns={completion: answer}"; expected'),
        ({"question": "a", "n": 1}, "unknown format: keys 'question', 'n'; expected"),
        ({f"{'k' * 500}{i}": 1 for i in range(50)}, "unknown format"),
        ({"messages": "Hi"}, "'messages' is a text, but not valid JSON"),
        ({"messages": '"Hi"'}, "'messages' must be a list"),
        ({"messages": [USER]}, "no assistant message"),
        ({"conversations": {}}, "'conversations' must be a list"),
        ({"conversations": [3]}, "turn 1 must be an object, not a number"),
        ({"conversations": [{"from": "bing", "value": "x"}]}, "turn 1: from 'bing' is none of system, human, user"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "turn 1: from"),
        ({"conversations": [{"from": "human", "value": None}]}, "turn 1: 'value' must be a string, not null"),
        ({"conversations": SHAREGPT[1:2]}, "no assistant message"),
        ({"conversations": [{"from": "gpt", "value": ""}]}, "message 1: the assistant message is empty"),
        ({"conversations": [{"from": "function_call", "value": "add"}]}, "turn 1: a function call is a text"),
        ({"conversations": [{"from": "function_call", "value": "3"}]}, "turn 1: a tool call must have a 'name'"),
        ({"conversations": SHAREGPT, "system": 3}, "'system' must be a string, not a number"),
        ({"instruction": "One?", "output": None}, "'output' must be a string, not null"),
        ({"instruction": None, "output": "x"}, "'instruction' must be a string, not null"),
        ({"instruction": " ", "output": "x"}, "'instruction' and 'input' are both empty"),
        ({"instruction": "One?", "output": ""}, "the assistant message is empty"),
        (PAIR | {"input": 3}, "'input' must be a string, not a number"),
        (PAIR | {"history": [["a"]]}, "'history' must be a list of [question, answer] pairs"),
        (PAIR | {"history": [["a", 3]]}, "'history' must be a list of [question, answer] pairs"),
        (PAIR | {"history": "["}, "'history' is a text, but not valid JSON"),
        ({"prompt": "One?", "completion": None}, "'response' must be a text or a list of messages, not null"),
        ({"prompt": [], "completion": "x"}, "'prompt' must be a text or a list of messages, not a list"),
        ({"prompt": "One?", "completion": [USER]}, "no assistant message"),
        ({"prompt": "One?", "completion": " "}, "the assistant message is empty"),
        ({"text": None}, "'text' must be a string, not null"),
        ({"text": ["x"]}, "'text' must be a string, not a list"),
        ({"text": " \n"}, "the text is empty"),
        ({"input_ids": "12", "labels": [1, 2]}, "list of whole numbers"),
        ({"input_ids": [1, 2.0], "labels": [1, 2]}, "list of whole numbers"),
        ({"input_ids": [1, True], "labels": [1, 1]}, "list of whole numbers"),
        ({"input_ids": [1], "labels": [1]}, "so it needs at least 2"),
        ({"input_ids": [1, -2], "labels": [1, -2]}, "token id -2 is not within"),
        ({"input_ids": [1, 10], "labels": [1, 10]}, "token id 10 is not within the vocabulary of 10"),
        ({"input_ids": [1, 2], "labels": [1, 2], "loss_mask": [0, 1]}, "keep one"),
        ({"input_ids": [1, 2], "labels": [1]}, "as long as 'input_ids'"),
        ({"input_ids": [1, 2], "labels": [1, 3]}, "label 3 at position 1 is neither the token 2 nor -100"),
        ({"input_ids": [1, 2], "labels": [1, "2"]}, "label 2 at position 1"),
        ({"input_ids": [1, 2], "loss_mask": [0, 1, 1]}, "as long as 'input_ids'"),
        ({"input_ids": [1, 2], "loss_mask": [0, 2]}, "only 0 and 1"),
        ({"input_ids": [1, 2], "loss_mask": [0, 1.0]}, "only 0 and 1"),
        ({"input_ids": [1, 2], "loss_mask": [0, True]}, "only 0 and 1"),
        ({"input_ids": [1, 2], "loss_mask": 1}, "as long as 'input_ids'"),
    ],
)
def test_a_wrong_row_is_refused_with_its_reason(row: dict[str, Any], reason: str) -> None:
    assert reason in refused(row)


@pytest.mark.parametrize("limit", [2, 3, 4, 7, 100])
@pytest.mark.parametrize("length", [2, 3, 4, 5, 6, 7, 8, 13, 99, 100, 101])
def test_pieces_of_a_sample_overlap_by_one_token_and_lose_no_target(length: int, limit: int) -> None:
    whole = EncodedSample(list(range(length)), [0] + [position % 3 % 2 for position in range(1, length)])
    parts = whole.split(limit)
    assert all(2 <= len(part.input_ids) == len(part.loss_mask) <= limit for part in parts)
    assert [token for part in parts for token in part.input_ids[1:]] == whole.input_ids[1:]
    assert [flag for part in parts for flag in part.loss_mask[1:]] == whole.loss_mask[1:]
    assert {part.loss_mask[0] for part in parts} == {0}
    assert [part.input_ids[0] for part in parts] == [0, *(part.input_ids[-1] for part in parts[:-1])]
    assert len(parts) == -(-(length - 1) // (limit - 1))


def test_older_and_newer_names_of_openai_and_others_are_read() -> None:
    function = {"name": "add", "parameters": {}}
    conversation = parse(
        {
            "system": "Be brief.",
            "messages": [
                {"role": "user", "content": "1 + 1?"},
                {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}},
                {"role": "function", "name": "add", "content": "2"},
                {"role": "assistant", "content": "Two.", "reasoning": "It says so."},
            ],
            "functions": [function],
        }
    )
    assert conversation == Conversation(
        (
            Message("system", "Be brief."),
            Message("user", "1 + 1?"),
            Message("assistant", "", None, (ToolCall("add", '{"a": 1}'),)),
            Message("tool", "2"),
            Message("assistant", "Two.", "It says so."),
        ),
        ({"type": "function", "function": function},),
    )


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"reasoning": "a", "thinking": "b"}, "has reasoning and thinking; keep one"),
        ({"thinking": 3}, "'thinking' must be a string, not a number"),
        ({"weight": 0.5}, "'weight' must be 0 or false (read, not supervised) or 1 or true (supervised), not 0.5"),
    ],
)
def test_what_an_answer_says_of_itself_must_make_sense(answer: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as raised:
        parse({"messages": [{"role": "assistant", "content": "x"} | answer]})
    assert reason in str(raised.value)
