from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from qwlit.core.errors import DataError
from qwlit.data.conversation import parse_conversation
from qwlit.data.recognise import recognise_template, resolve_template
from qwlit.data.remarks import (
    HISTORY_THINKING,
    NO_EMPTY_BLOCK,
    NULLS_FROM_TABLE,
    QUOTED_ARGUMENTS,
    TAGS_AS_TEXT,
    THINKING_LEFT_OUT,
    remarks,
)
from qwlit.data.rows import RowError
from qwlit.data.templates import FAMILIES, IM_END, Piece, Supervision, render
from tests.conversations import Messages, conversation, supervised_spans, without_reasoning
from tests.real_tokenizer import JINJA, SYSTEM_QWEN2, SYSTEM_QWEN2_5, small_tokenizer

USER = {"role": "user", "content": "Hi"}
ONE = {"role": "assistant", "content": "One."}
CALL = {"name": "add", "arguments": {"a": 1}}
LOSS_ON = ("assistant", "last_assistant", "all")
THINKING = ("mask_empty", "keep", "drop")
WITH_TOOLS = [family for family in FAMILIES if family != "qwen2"]


def jinja(template: str) -> Callable[[Messages, list[dict[str, Any]] | None], str]:
    return lambda messages, tools: render_jinja_template([messages], tools=tools, chat_template=template)[0][0]


def pieces(messages: Messages, template: str, tools: Any = None, **supervision: Any) -> list[Piece]:
    return render(parse_conversation(messages, tools), FAMILIES[template], Supervision(**supervision))


def text_of(rendered: list[Piece]) -> str:
    return "".join(piece.text for piece in rendered)


def supervised_text(rendered: list[Piece]) -> str:
    return "".join(piece.text for piece in rendered if piece.supervised)


def generated(family: str, seed: int) -> tuple[Messages, Any]:
    return conversation(seed, tools=family != "qwen2", thinking=family == "qwen3")


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_join_to_what_the_jinja_template_renders(family: str) -> None:
    for seed in range(300):
        messages, tools = generated(family, seed)
        assert text_of(pieces(messages, family, tools)) == jinja(JINJA[family])(messages, tools), seed


@pytest.mark.parametrize("thinking", THINKING)
@pytest.mark.parametrize("loss_on", LOSS_ON)
@pytest.mark.parametrize("family", FAMILIES)
def test_supervised_is_what_the_settings_say_of_what_the_jinja_template_renders(
    family: str, loss_on: str, thinking: str
) -> None:
    for seed in range(60):
        messages, tools = generated(family, seed)
        rendered = pieces(messages, family, tools, loss_on=loss_on, thinking=thinking)
        text = jinja(JINJA[family])(without_reasoning(messages) if thinking == "drop" else messages, tools)
        assert text_of(rendered) == text, seed
        expected = [text[start:end] for start, end in supervised_spans(text, loss_on, thinking)]
        assert supervised_text(rendered) == "".join(expected), seed


@pytest.mark.parametrize("family", FAMILIES)
def test_only_answers_and_their_end_are_supervised(family: str) -> None:
    messages = [USER, ONE, USER, {"role": "assistant", "content": "Two.\n"}]
    assert supervised_text(pieces(messages, family)) == f"One.{IM_END}Two.\n{IM_END}"
    assert supervised_text(pieces(messages, family, loss_on="last_assistant")) == f"Two.\n{IM_END}"
    assert all(piece.supervised for piece in pieces(messages, family, loss_on="all"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_answer_is_supervised_also_where_the_conversation_goes_on(family: str) -> None:
    messages = [USER, ONE, USER, {"role": "assistant", "content": "Two."}, USER]
    assert supervised_text(pieces(messages, family, loss_on="last_assistant", thinking="keep")) == f"Two.{IM_END}"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_later_system_message_is_a_turn_of_its_own(family: str) -> None:
    messages = [USER, ONE, {"role": "system", "content": "Be brief."}, USER, ONE]
    rendered = pieces(messages, family)
    assert f"One.{IM_END}\n<|im_start|>system\nBe brief.{IM_END}\n<|im_start|>user\nHi{IM_END}" in text_of(rendered)
    assert text_of(rendered) == jinja(JINJA[family])(messages, None)
    default = FAMILIES[family].default_system
    assert text_of(rendered).startswith(f"<|im_start|>system\n{default}{IM_END}" if default else "<|im_start|>user")


def test_thinking_before_the_last_question_is_stripped() -> None:
    first = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nOne."}
    rendered = pieces([USER, first, USER, {"role": "assistant", "content": "Two."}], "qwen3")
    assert "hm" not in text_of(rendered)
    assert supervised_text(rendered) == f"One.{IM_END}Two.{IM_END}"


def test_thinking_is_supervised_with_its_tags() -> None:
    rendered = pieces([USER, ONE | {"reasoning_content": "hm"}], "qwen3")
    assert supervised_text(rendered) == f"<think>\nhm\n</think>\n\nOne.{IM_END}"
    inline = pieces([USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nOne."}], "qwen3")
    assert inline == rendered
    assert pieces([USER, ONE | {"reasoning_content": "hm"}], "qwen3", thinking="keep") == rendered


@pytest.mark.parametrize("extra", [{}, {"reasoning_content": ""}, {"reasoning_content": "\n"}])
def test_an_empty_think_block_is_read_and_supervised_only_where_it_is_kept(extra: dict[str, str]) -> None:
    block = "<think>\n\n</think>\n\n"
    for thinking, expected in (("mask_empty", "One."), ("drop", "One."), ("keep", f"{block}One.")):
        rendered = pieces([USER, ONE | extra], "qwen3", thinking=thinking)
        assert text_of(rendered).endswith(f"{block}One.{IM_END}\n")
        assert supervised_text(rendered) == expected + IM_END


def test_an_empty_block_outside_the_last_answer_is_not_supervised_where_only_that_is() -> None:
    messages = [USER, ONE | {"tool_calls": [CALL], "reasoning_content": "hm"}, {"role": "tool", "content": "1"}, ONE]
    rendered = pieces(messages, "qwen3", loss_on="last_assistant", thinking="keep")
    assert supervised_text(rendered) == f"<think>\n\n</think>\n\nOne.{IM_END}"


@pytest.mark.parametrize("family", FAMILIES)
def test_drop_takes_reasoning_out_wherever_it_stands(family: str) -> None:
    inline = {"role": "assistant", "content": " \n<think>\nhm\n</think>\n\nOne."}
    apart = ONE | {"reasoning_content": "hm"}
    for messages in ([USER, inline], [USER, apart], [USER, inline, USER, apart]):
        plain = [USER, ONE] * (len(messages) // 2)
        assert pieces(messages, family, thinking="drop") == pieces(plain, family, thinking="drop")


def test_drop_refuses_an_answer_of_reasoning_alone() -> None:
    for answer in ({"content": "", "reasoning_content": "hm"}, {"content": "<think>hm</think>"}):
        with pytest.raises(RowError, match=r"only reasoning, which data\.thinking=drop removes"):
            pieces([USER, {"role": "assistant", **answer}], "qwen3", thinking="drop")


@pytest.mark.parametrize("content", ["hm</think>One.", "So <think>hm</think> One.", "</think><think>", "<think>One."])
def test_think_tags_that_open_no_answer_or_never_close_are_text(content: str) -> None:
    rendered = pieces([USER, {"role": "assistant", "content": content}], "qwen3")
    assert supervised_text(rendered) == content + IM_END
    assert [p.text for p in rendered if p.control].count("<think>") == 1
    assert pieces([USER, {"role": "assistant", "content": content}], "qwen3", thinking="drop") == rendered


def test_only_the_first_closing_tag_ends_the_reasoning() -> None:
    rendered = pieces([USER, {"role": "assistant", "content": "<think>hm</think>One </think> two."}], "qwen3")
    assert supervised_text(rendered) == f"<think>\nhm\n</think>\n\nOne </think> two.{IM_END}"


def test_a_users_text_in_response_tags_is_an_ordinary_question() -> None:
    asked = {"role": "user", "content": "<tool_response>\n1\n</tool_response>"}
    rendered = pieces([USER, ONE | {"reasoning_content": "hm"}, asked, ONE], "qwen3")
    assert "hm" not in text_of(rendered)
    assert [p.text for p in rendered if p.control and "tool" in p.text] == []


@pytest.mark.parametrize("family", WITH_TOOLS)
def test_tool_calls_are_supervised_and_responses_are_not(family: str) -> None:
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "Five."},
    ]
    written = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    rendered = pieces(messages, family)
    assert supervised_text(rendered) == f"{written}\n{written}{IM_END}Five.{IM_END}"
    assert supervised_text(pieces(messages, family, loss_on="last_assistant")) == f"Five.{IM_END}"
    response = "<tool_response>\n{}\n</tool_response>"
    assert f"user\n{response.format(2)}\n{response.format(3)}{IM_END}" in text_of(rendered)


def test_arguments_as_json_text_stand_as_they_are_or_quoted_as_the_family_does() -> None:
    call = {"name": "add", "arguments": '{"a":1}'}
    for family, written in {"qwen2_5": r'"{\"a\":1}"', "qwen3": '{"a":1}', "qwen3_2507": '{"a":1}'}.items():
        rendered = pieces([USER, ONE | {"tool_calls": [call]}], family)
        assert f'One.\n<tool_call>\n{{"name": "add", "arguments": {written}}}\n</tool_call>' in text_of(rendered)


def test_text_of_messages_is_never_a_control_piece() -> None:
    tags = "<|im_end|><|im_start|>system\n<tool_call></tool_call><tool_response></tool_response><think>"
    messages = [
        {"role": "system", "content": tags},
        {"role": "user", "content": tags},
        {"role": "assistant", "content": tags, "tool_calls": [{"name": tags, "arguments": {"x": tags}}]},
        {"role": "tool", "content": tags},
        {"role": "system", "content": tags},
        {"role": "assistant", "content": f"x{tags}</think>", "reasoning_content": tags + "</think>"},
    ]
    marked = pieces(messages, "qwen3", [{"name": tags}])
    plain = [{key: _without_tags(value, tags) for key, value in message.items()} for message in messages]
    clean = pieces(plain, "qwen3", [{"name": "-"}])
    assert [p.text for p in marked if p.control] == [p.text for p in clean if p.control]


def _without_tags(value: Any, tags: str) -> Any:
    if isinstance(value, list):
        return [{"name": "-", "arguments": {"x": "-"}}]
    return value.replace(tags, "-").replace("</think>", "")


def test_qwen2_refuses_tools_and_families_without_thinking_an_answer_of_reasoning_only() -> None:
    with pytest.raises(RowError, match="does not support tools"):
        pieces([USER, ONE], "qwen2", [{"name": "add"}])
    with pytest.raises(RowError, match="does not support tools"):
        pieces([USER, {"role": "tool", "content": "1"}, ONE], "qwen2")
    for family in ("qwen2", "qwen2_5", "qwen3_2507"):
        with pytest.raises(RowError, match=f"only reasoning, which template {family} leaves out"):
            pieces([USER, {"role": "assistant", "content": "", "reasoning_content": "hm"}], family)


@pytest.mark.parametrize(
    ("family", "answer", "expected"),
    [
        ("qwen3", {"reasoning_content": "hm"}, [HISTORY_THINKING]),
        ("qwen3", {"content": "<think>hm</think>One."}, [HISTORY_THINKING]),
        ("qwen3", {"content": "One, <think> two."}, [NO_EMPTY_BLOCK, TAGS_AS_TEXT]),
        ("qwen3", {"content": "<tool_call>{}</tool_call>"}, [NO_EMPTY_BLOCK, TAGS_AS_TEXT]),
        ("qwen3_2507", {"reasoning_content": "hm"}, [THINKING_LEFT_OUT]),
        ("qwen2_5", {"content": "<think>hm</think>One."}, [TAGS_AS_TEXT]),
        ("qwen3", {}, [NO_EMPTY_BLOCK]),
        ("qwen3", {"weight": 0}, []),
        ("qwen3", {"weight": 0, "reasoning_content": "hm"}, []),
        ("qwen3_2507", {}, []),
        ("qwen2_5", {}, []),
    ],
)
def test_what_a_template_does_to_an_answer_is_remarked_on(family: str, answer: Any, expected: list[str]) -> None:
    assert (
        list(
            remarks(
                parse_conversation([USER, ONE | answer, USER, ONE]), FAMILIES[family], Supervision(), from_table=False
            )
        )
        == expected
    )


def test_an_earlier_answer_of_reasoning_alone_would_be_supervised_as_empty_and_is_refused() -> None:
    for thought in ({"content": "<think>a</think>"}, {"content": "", "reasoning_content": "a"}):
        messages = [USER, {"role": "assistant", **thought}, USER, {"role": "assistant", "content": "z"}]
        with pytest.raises(RowError, match="only reasoning, which template qwen3 leaves out"):
            pieces(messages, "qwen3")
        assert supervised_text(pieces(messages[:2], "qwen3")) == f"<think>\na\n</think>\n\n{IM_END}"


def test_what_json_cannot_say_is_no_argument() -> None:
    for value in (float("nan"), float("inf"), b"x", {1, 2}):
        call = {"name": "add", "arguments": {"a": value}}
        with pytest.raises(RowError, match="cannot be written as JSON"):
            pieces([USER, {"role": "assistant", "content": "", "tool_calls": [call]}], "qwen3")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_own_jinja_is_recognised(family: str) -> None:
    assert recognise_template(jinja(JINJA[family])) == FAMILIES[family]


def test_an_unknown_or_missing_template_is_refused_with_the_remedy() -> None:
    with pytest.raises(DataError, match=r"no chat template.*data\.template="):
        resolve_template(SimpleNamespace(chat_template=None), "auto")
    others = [JINJA["qwen3"].replace("<think>\\n", "<think>"), "{{ undefined.attribute }}", "{{ messages[9].x.y }}", ""]
    others.append(JINJA["qwen3_2507"].replace("if f.arguments is string", "if false").replace("\\n<tool_resp", " <t"))
    # Another default text, but not wherever there is no system turn.
    others.append(JINJA["qwen2_5"].replace(f"else '{SYSTEM_QWEN2_5}'", "else ('With.' if tools else 'Without.')"))
    for template in others:
        with pytest.raises(
            DataError, match=r"known: qwen3, qwen3_2507, qwen2_5, qwen2_5_base, qwen2\);.*data\.template="
        ):
            recognise_template(jinja(template))


SYSTEM_MATH = "Please reason step by step, and put your final answer within \\boxed{}."


@pytest.mark.parametrize(
    ("family", "template", "system"),
    [
        ("qwen2_5", JINJA["qwen2_5"].replace(SYSTEM_QWEN2_5, SYSTEM_MATH.replace("\\", "\\\\")), SYSTEM_MATH),
        ("qwen2_5", JINJA["qwen2_5"].replace(SYSTEM_QWEN2_5, ""), ""),
        ("qwen2", JINJA["qwen2"].replace(SYSTEM_QWEN2, "You are a helpful assistant"), "You are a helpful assistant"),
        ("qwen2", JINJA["qwen2"].partition("{% endif %}")[2], None),
        (
            "qwen3",
            "{%- set sys = [{'role': 'system', 'content': 'Be kind.'}] %}"
            "{%- if messages[0].role != 'system' %}{%- set messages = sys + messages %}{%- endif %}" + JINJA["qwen3"],
            "Be kind.",
        ),
        (
            "qwen3_2507",
            "{%- set sys = [{'role': 'system', 'content': 'Be kind.'}] %}"
            "{%- if messages[0].role != 'system' %}{%- set messages = sys + messages %}{%- endif %}"
            + JINJA["qwen3_2507"],
            "Be kind.",
        ),
    ],
)
def test_a_family_with_another_default_system_text_is_recognised_and_written_as_its_jinja_does(
    family: str, template: str, system: str | None
) -> None:
    found = recognise_template(jinja(template))
    assert found == replace(FAMILIES[family], default_system=system)
    for seed in range(60):
        messages, tools = generated(family, seed)
        conversation = parse_conversation(messages, tools)
        assert text_of(render(conversation, found, Supervision())) == jinja(template)(messages, tools), seed


def test_what_the_settings_leave_unsupervised_anyway_is_not_remarked_on() -> None:
    conversation = parse_conversation([USER, ONE | {"reasoning_content": "hm"}, USER, ONE])
    remarked = {
        supervision: list(remarks(conversation, FAMILIES["qwen3"], supervision, from_table=False))
        for supervision in (Supervision(loss_on="last_assistant"), Supervision(thinking="drop"))
    }
    # With its reasoning dropped, the first answer is one without reasoning in an earlier turn.
    assert list(remarked.values()) == [[], [NO_EMPTY_BLOCK]]


CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESPONSE = {"role": "tool", "content": "2"}


@pytest.mark.parametrize(
    ("messages", "supervision", "expected"),
    [
        ([USER, CALLED, RESPONSE, ONE], Supervision(), True),
        ([USER, CALLED | {"reasoning_content": "hm"}, RESPONSE, ONE], Supervision(), False),
        ([USER, CALLED, RESPONSE, ONE], Supervision(loss_on="last_assistant"), False),
        ([USER, CALLED, RESPONSE], Supervision(loss_on="last_assistant"), True),
        ([USER, CALLED], Supervision(), False),
        ([USER, ONE], Supervision(loss_on="all"), False),
        ([USER, ONE, USER, ONE], Supervision(loss_on="all"), True),
        ([USER, ONE, USER], Supervision(), True),
    ],
)
def test_supervised_answers_and_calls_without_the_empty_block_are_remarked_on_where_the_jinja_writes_none(
    messages: Messages, supervision: Supervision, expected: bool
) -> None:
    found = list(remarks(parse_conversation(messages), FAMILIES["qwen3"], supervision, from_table=False))
    assert (NO_EMPTY_BLOCK in found) is expected
    written = jinja(JINJA["qwen3"])(messages, None).split("<|im_start|>assistant\n")[1:]
    if supervision.loss_on == "last_assistant":
        written = written[-1:]
    assert any(not answer.startswith("<think>") for answer in written) is expected


def test_keys_that_nobody_reads_and_arguments_that_get_quoted_are_remarked_on() -> None:
    call = {"name": "add", "arguments": '{"a": 1}'}
    conversation = parse_conversation([USER | {"name": "Li", "mood": "glad"}, ONE | {"tool_calls": [call]}])
    assert list(remarks(conversation, FAMILIES["qwen2_5"], Supervision(), from_table=False)) == [
        "a message key that is not read: 'mood'",
        QUOTED_ARGUMENTS,
    ]


def test_an_answer_of_weight_0_is_read_and_not_supervised() -> None:
    bad = {"role": "assistant", "content": "Bad.", "weight": 0}
    rendered = pieces([USER, bad, USER, ONE | {"weight": 1}], "qwen3")
    assert "Bad." in text_of(rendered)
    assert supervised_text(rendered) == f"One.{IM_END}"


def test_nulls_that_a_table_fills_in_are_remarked_on() -> None:
    call = {"name": "add", "arguments": {"x": 1, "y": {"z": None}}}
    conversation = parse_conversation([USER, {"role": "assistant", "content": "", "tool_calls": [call]}])
    assert list(remarks(conversation, FAMILIES["qwen3"], Supervision(), from_table=True)) == [NULLS_FROM_TABLE]
    assert not list(remarks(conversation, FAMILIES["qwen3"], Supervision(), from_table=False))


def test_of_several_templates_the_default_one_counts() -> None:
    tokenizer = small_tokenizer("qwen3")
    tokenizer.chat_template = {"default": JINJA["qwen3"], "tool_use": "{{ 'something else' }}"}
    assert resolve_template(tokenizer, "auto").name == "qwen3"
    tokenizer.chat_template = {"tool_use": JINJA["qwen3"]}
    with pytest.raises(DataError, match="several chat templates, but none called 'default'"):
        resolve_template(tokenizer, "auto")
