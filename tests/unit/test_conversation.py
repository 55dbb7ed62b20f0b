import json
from typing import Any

import pytest

from qwlit.data.conversation import Conversation, Message, ToolCall, parse_conversation
from qwlit.data.rows import RowError

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
CALL = {"function": {"name": "add", "arguments": {"a": 1}}}


def test_a_conversation_is_parsed_with_all_its_parts() -> None:
    parts = [{"type": "text", "text": "Wie "}, {"text": "geht's?"}]
    messages = [
        {"role": "system", "content": ""},
        {"role": "user", "content": parts, "name": "ignored"},
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "tool_calls": [{"name": "add", "arguments": '{"a": 2}'}]},
        {"role": "system", "content": "Be brief."},
        ANSWER | {"tool_calls": None, "reasoning_content": None},
    ]
    assert parse_conversation(messages, [{"name": "add"}]) == Conversation(
        messages=(
            Message("system", ""),
            Message("user", "Wie geht's?"),
            Message("assistant", "", "hm", (ToolCall("add", {"a": 1}),)),
            Message("tool", "2"),
            Message("assistant", "", None, (ToolCall("add", '{"a": 2}'),)),
            Message("system", "Be brief."),
            Message("assistant", "Hello"),
        ),
        tools=({"type": "function", "function": {"name": "add"}},),
    )


@pytest.mark.parametrize("tools", [None, [], "", "  ", "[]", "null"])
def test_tools_may_be_left_out_in_many_ways(tools: object) -> None:
    assert parse_conversation([USER, ANSWER], tools).tools == ()


def test_tools_may_be_a_json_text() -> None:
    tools = [{"name": "add", "parameters": {"a": "Zahl"}}]
    wrapped = tuple({"type": "function", "function": tool} for tool in tools)
    assert parse_conversation([USER, ANSWER], json.dumps(tools)).tools == wrapped
    assert parse_conversation([USER, ANSWER], json.dumps(wrapped)).tools == wrapped


@pytest.mark.parametrize(
    ("messages", "tools", "reason"),
    [
        ([], None, "at least one message, not an empty one"),
        (None, None, "not null"),
        ("Hi", None, "must be a list"),
        ([[USER, ANSWER]], None, "message 1 must be an object, not a list"),
        ([USER], None, "no assistant message"),
        ([{"role": "system", "content": "x"}], None, "no assistant message"),
        ([{"role": "human", "content": "x"}, ANSWER], None, "role 'human' is none of system, user"),
        ([{"role": "asistant", "content": "x"}, ANSWER], None, "Did you mean 'assistant'?"),
        ([{"content": "x"}, ANSWER], None, "message 1: the key 'role' is missing"),
        ([{"from": "human", "value": "x"}], None, "data.columns='{conversations: messages}'"),
        ([{"role": ["user"], "content": "x"}, ANSWER], None, "message 1: role"),
        ([{"role": "user"}, ANSWER], None, "'content' must be a string or a list of text parts, not null"),
        ([USER | {"content": {"text": "x"}}, ANSWER], None, "not an object"),
        ([USER | {"content": [{"type": "image_url", "image_url": "x"}]}, ANSWER], None, "not image_url"),
        ([USER | {"content": [{"type": "audio", "text": "x"}]}, ANSWER], None, "type 'text'"),
        ([USER | {"content": ["x"]}, ANSWER], None, "not a list"),
        ([USER, {"role": "assistant", "content": None}], None, "message 2: 'content'"),
        ([USER, {"role": "assistant", "content": " \n"}], None, "message 2: the assistant message is empty"),
        (
            [USER, {"role": "assistant", "content": "", "reasoning_content": " "}],
            None,
            "the assistant message is empty",
        ),
        ([USER, {"role": "assistant", "content": [], "tool_calls": []}], None, "the assistant message is empty"),
        ([USER, ANSWER | {"reasoning_content": 3}], None, "'reasoning_content' must be a string, not a number"),
        ([USER | {"reasoning_content": "hm"}, ANSWER], None, "only an assistant message may have 'reasoning_content'"),
        ([USER | {"tool_calls": [CALL]}, ANSWER], None, "only an assistant"),
        ([USER, ANSWER | {"tool_calls": "add"}], None, "'tool_calls' must be a list"),
        ([USER, ANSWER | {"tool_calls": ["add"]}], None, "'name' and 'arguments'"),
        ([USER, ANSWER | {"tool_calls": [{"function": {"name": 1}}]}], None, "'name' and 'arguments'"),
        ([USER, ANSWER | {"tool_calls": [{"name": "a"}]}], None, "'arguments' must be an object"),
        ([USER, ANSWER | {"tool_calls": [{"name": "a", "arguments": "{"}]}], None, "'arguments' must be an object"),
        ([USER, ANSWER | {"tool_calls": [{"name": "a", "arguments": "[1]"}]}], None, "'arguments' must be an object"),
        ([USER, ANSWER], {"name": "add"}, "'tools' must be a list of objects"),
        ([USER, ANSWER], ["add"], "'tools' must be a list of objects"),
        ([USER, ANSWER], "[", "'tools' is a text, but not valid JSON"),
        ([USER, ANSWER], '{"name": "add"}', "'tools' must be a list of objects"),
    ],
)
def test_a_wrong_conversation_is_refused_with_its_reason(messages: Any, tools: Any, reason: str) -> None:
    with pytest.raises(RowError) as raised:
        parse_conversation(messages, tools)
    assert reason in str(raised.value)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (Message("assistant", "One."), ("", "One.")),
        (Message("assistant", "One.", "hm"), ("hm", "One.")),
        (Message("assistant", "<think>\nhm\n</think>\n\nOne."), ("hm", "One.")),
        (Message("assistant", " \n<think>hm</think>One."), ("hm", "One.")),
        (Message("assistant", "<think>\n\n</think>\n\nOne."), ("", "One.")),
        (Message("assistant", "<think>a</think>b</think>c"), ("a", "b</think>c")),
        (Message("assistant", "<think>hm</think>One.", ""), ("", "<think>hm</think>One.")),
        (Message("assistant", "hm</think>One."), ("", "hm</think>One.")),
        (Message("assistant", "So <think>hm</think>One."), ("", "So <think>hm</think>One.")),
        (Message("assistant", "<think>One."), ("", "<think>One.")),
        (Message("assistant", "</think><think>"), ("", "</think><think>")),
    ],
)
def test_reasoning_is_apart_or_in_a_block_that_opens_the_answer(message: Message, expected: tuple[str, str]) -> None:
    assert message.split_thinking() == expected
    assert message.without_thinking() == Message("assistant", expected[1])
