"""The Jinja that an export carries: it renders what training rendered, and is recognised as its own family."""

from dataclasses import replace
from typing import Any

import pytest

from qwlit.data.chat_template import chat_template
from qwlit.data.conversation import parse_conversation
from qwlit.data.recognise import resolve_template
from qwlit.data.templates import FAMILIES, Supervision, render
from tests.conversations import conversation
from tests.real_tokenizer import JINJA, small_tokenizer

TWO_TOOLS_IN_A_ROW: list[dict[str, Any]] = [
    {"role": "user", "content": "Add."},
    {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": 1}}] * 2},
    {"role": "tool", "content": "1"},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "Three."},
]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    """The family's name, a tokenizer with the official template's behaviour, and one with ours."""
    official, ours = small_tokenizer(request.param), small_tokenizer(request.param)
    assert official.chat_template == JINJA[request.param]
    ours.chat_template = chat_template(FAMILIES[request.param])
    return request.param, official, ours


def test_it_renders_what_the_official_template_renders(pair: tuple[str, Any, Any]) -> None:
    name, official, ours = pair
    family = FAMILIES[name]
    chats = [conversation(seed, tools=family.tools, thinking=family.thinking) for seed in range(150)]
    chats += [(TWO_TOOLS_IN_A_ROW, None)] if family.tools else []
    for messages, tools in chats:
        options: dict[str, Any] = {"tools": tools, "tokenize": False}
        assert ours.apply_chat_template(messages, **options) == official.apply_chat_template(messages, **options)


@pytest.mark.parametrize("more", [{}, {"enable_thinking": True}, {"enable_thinking": False}])
def test_the_prompt_for_an_answer_is_the_official_one(pair: tuple[str, Any, Any], more: dict[str, bool]) -> None:
    _, official, ours = pair
    options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": False, **more}
    chat = [{"role": "user", "content": "你好"}]
    assert ours.apply_chat_template(chat, **options) == official.apply_chat_template(chat, **options)


def test_it_is_recognised_as_its_own_family(pair: tuple[str, Any, Any]) -> None:
    name, _, ours = pair
    assert resolve_template(ours, "auto") == FAMILIES[name]


def test_a_default_system_text_with_any_characters_survives() -> None:
    text = "Put it in \\boxed{}.\n\"q\" 's' {{ x }} {% y %} 你 \\n"
    family = replace(FAMILIES["qwen2_5"], default_system=text)
    tokenizer = small_tokenizer("qwen2_5")
    tokenizer.chat_template = chat_template(family)
    assert resolve_template(tokenizer, "auto") == family
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    trained = "".join(piece.text for piece in render(parse_conversation(messages), family, Supervision()))
    assert tokenizer.apply_chat_template(messages, tokenize=False) == trained


@pytest.mark.parametrize("name", FAMILIES)
def test_a_typed_system_text_is_written_as_the_official_template_writes_it_as_a_system_turn(name: str) -> None:
    official, ours = small_tokenizer(name), small_tokenizer(name)
    family = replace(FAMILIES[name], default_system="Sei knapp. 简短。")
    ours.chat_template = chat_template(family)
    chats = [conversation(seed, tools=family.tools, thinking=family.thinking) for seed in range(20)]
    assert {messages[0]["role"] for messages, _ in chats} == {"system", "user"}
    for messages, tools in chats:
        given = messages[0]["role"] == "system"
        explicit = messages if given else [{"role": "system", "content": "Sei knapp. 简短。"}, *messages]
        expected = official.apply_chat_template(explicit, tools=tools, tokenize=False)
        assert ours.apply_chat_template(messages, tools=tools, tokenize=False) == expected
        trained = render(parse_conversation(messages, tools), family, Supervision())
        assert "".join(piece.text for piece in trained) == expected
