import random
from collections.abc import Callable
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from qwlit.core.errors import DataError
from qwlit.data.rows import RowError, parse_conversation
from qwlit.data.templates import END, FAMILIES, Piece, recognise_template, render
from tests.conversations import conversation
from tests.real_tokenizer import JINJA

USER = {"role": "user", "content": "Hi"}


def jinja(template: str) -> Callable[[list[dict[str, Any]], list[dict[str, Any]] | None], str]:
    return lambda messages, tools: render_jinja_template([messages], tools=tools, chat_template=template)[0][0]


def pieces(messages: list[dict[str, Any]], template: str, tools: list[dict[str, Any]] | None = None) -> list[Piece]:
    return render(parse_conversation({"messages": messages, "tools": tools}), template)


def text_of(rendered: list[Piece]) -> str:
    return "".join(piece.text for piece in rendered)


def learnt(rendered: list[Piece]) -> str:
    return "".join(piece.text for piece in rendered if piece.supervised)


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_join_to_what_the_jinja_template_renders(family: str) -> None:
    for seed in range(300):
        messages, tools = conversation(seed, tools=family != "qwen2", thinking=family == "qwen3")
        assert text_of(pieces(messages, family, tools)) == jinja(JINJA[family])(messages, tools), seed


@pytest.mark.parametrize("family", FAMILIES)
def test_only_answers_and_their_end_are_learnt(family: str) -> None:
    messages = [USER, {"role": "assistant", "content": "One."}, USER, {"role": "assistant", "content": "Two.\n"}]
    assert learnt(pieces(messages, family)) == f"One.{END}Two.\n{END}"


def test_thinking_before_the_last_question_is_stripped() -> None:
    first = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nOne."}
    rendered = pieces([USER, first, USER, {"role": "assistant", "content": "Two."}], "qwen3")
    assert "hm" not in text_of(rendered)
    assert learnt(rendered) == f"One.{END}Two.{END}"


def test_thinking_is_learnt_with_its_tags() -> None:
    rendered = pieces([USER, {"role": "assistant", "content": "One.", "reasoning_content": "hm"}], "qwen3")
    assert learnt(rendered) == f"<think>\nhm\n</think>\n\nOne.{END}"
    inline = pieces([USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nOne."}], "qwen3")
    assert inline == rendered


def test_an_empty_think_block_is_read_and_not_learnt() -> None:
    for extra in ({}, {"reasoning_content": ""}, {"reasoning_content": "\n"}):
        rendered = pieces([USER, {"role": "assistant", "content": "One.", **extra}], "qwen3")
        assert text_of(rendered).endswith(f"<think>\n\n</think>\n\nOne.{END}\n")
        assert learnt(rendered) == f"One.{END}"


def test_tool_calls_are_learnt_and_responses_are_not() -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "Five."},
    ]
    written = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    for family in ("qwen2_5", "qwen3"):
        rendered = pieces(messages, family)
        assert learnt(rendered) == f"{written}\n{written}{END}Five.{END}"
        response = "<tool_response>\n{}\n</tool_response>"
        assert f"user\n{response.format(2)}\n{response.format(3)}{END}" in text_of(rendered)


def test_text_of_messages_is_never_a_control_piece() -> None:
    tags = "<|im_end|><|im_start|>system\n<tool_call></tool_call><tool_response></tool_response><think>"
    messages = [
        {"role": "system", "content": tags},
        {"role": "user", "content": tags},
        {"role": "assistant", "content": tags, "tool_calls": [{"name": tags, "arguments": {"x": tags}}]},
        {"role": "tool", "content": tags},
        {"role": "assistant", "content": "", "reasoning_content": tags + "</think>"},
    ]
    marked = pieces(messages, "qwen3", [{"name": tags}])
    plain = [{key: _without_tags(value, tags) for key, value in message.items()} for message in messages]
    clean = pieces(plain, "qwen3", [{"name": "-"}])
    assert [p.text for p in marked if p.control] == [p.text for p in clean if p.control]


def _without_tags(value: Any, tags: str) -> Any:
    if isinstance(value, list):
        return [{"name": "-", "arguments": {"x": "-"}}]
    return value.replace(tags, "-").replace("</think>", "")


def test_qwen2_refuses_tools_and_qwen2_5_an_answer_of_reasoning_only() -> None:
    answer = {"role": "assistant", "content": "One."}
    with pytest.raises(RowError, match="knows no tools"):
        pieces([USER, answer], "qwen2", [{"name": "add"}])
    with pytest.raises(RowError, match="knows no tools"):
        pieces([USER, {"role": "tool", "content": "1"}, answer], "qwen2")
    with pytest.raises(RowError, match="only reasoning"):
        pieces([USER, {"role": "assistant", "content": "", "reasoning_content": "hm"}], "qwen2_5")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_own_jinja_is_recognised(family: str) -> None:
    assert recognise_template(jinja(JINJA[family])) == family


def test_an_unknown_or_missing_template_is_refused_with_the_remedy() -> None:
    with pytest.raises(DataError, match=r"no chat template.*data\.template="):
        recognise_template(None)
    rng = random.Random(0)
    others = [JINJA["qwen3"].replace("<think>\\n", "<think>"), "{{ undefined.attribute }}", "{{ messages[9].x.y }}", ""]
    for template in [*others, JINJA["qwen2_5"].replace("helpful", rng.choice(["harmless", "kind"]))]:
        with pytest.raises(DataError, match=r"none of qwen3, qwen2_5, qwen2.*data\.template="):
            recognise_template(jinja(template))
