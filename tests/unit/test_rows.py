from typing import Any

import pytest

from qwlit.data.rows import Conversation, EncodedSample, Message, RowError, ToolCall, parse_row


def chat(*messages: Any, **row: Any) -> dict[str, Any]:
    return {"messages": list(messages), **row}


USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
CALL = {"function": {"name": "add", "arguments": {"a": 1}}}


def test_a_conversation_is_parsed_with_all_its_parts() -> None:
    parts = [{"type": "text", "text": "Wie "}, {"type": "text", "text": "geht's?"}]
    row = chat(
        {"role": "system", "content": ""},
        {"role": "user", "content": parts, "name": "ignored"},
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "tool_calls": [{"name": "add", "arguments": '{"a": 2}'}]},
        ANSWER | {"tool_calls": None, "reasoning_content": None},
        tools=[{"name": "add"}],
        id=7,
    )
    assert parse_row(row, "auto", 10) == Conversation(
        messages=(
            Message("system", ""),
            Message("user", "Wie geht's?"),
            Message("assistant", "", "hm", (ToolCall("add", {"a": 1}),)),
            Message("tool", "2"),
            Message("assistant", "", None, (ToolCall("add", '{"a": 2}'),)),
            Message("assistant", "Hello"),
        ),
        tools=({"name": "add"},),
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "unknown shape: keys none"),
        ({"prompt": "a", "completion": "b"}, "'prompt', 'completion'; expected 'messages'"),
        ({"input_ids": [1, 2]}, "unknown shape"),
        ({"messages": []}, "at least one message"),
        ({"messages": "Hi"}, "must be a list"),
        (chat([USER, ANSWER]), "message 1 must be an object, not a list"),
        (chat(USER), "no assistant message"),
        (chat({"role": "system", "content": "x"}), "no assistant message"),
        (chat(USER, ANSWER, {"role": "system", "content": "x"}), "only stand first"),
        (chat({"role": "human", "content": "x"}, ANSWER), "role 'human' is none of system, user"),
        (chat({"content": "x"}, ANSWER), "role 'None'"),
        (chat({"role": ["user"], "content": "x"}, ANSWER), "message 1: role"),
        (chat({"role": "user"}, ANSWER), "message 1: 'content' must be a string or a list of text parts, not null"),
        (chat({"role": "user", "content": {"text": "x"}}, ANSWER), "not an object"),
        (chat({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER), "not a list"),
        (chat({"role": "user", "content": [{"type": "audio", "text": "x"}]}, ANSWER), "type 'text'"),
        (chat(USER, {"role": "assistant", "content": None}), "message 2: 'content'"),
        (chat(USER, {"role": "assistant", "content": " \n"}), "message 2: the assistant says nothing"),
        (chat(USER, ANSWER | {"reasoning_content": 3}), "'reasoning_content' must be a string, not a number"),
        (chat(USER | {"tool_calls": [CALL]}, ANSWER), "only an assistant"),
        (chat(USER, ANSWER | {"tool_calls": "add"}), "'tool_calls' must be a list"),
        (chat(USER, ANSWER | {"tool_calls": ["add"]}), "'name' and 'arguments'"),
        (chat(USER, ANSWER | {"tool_calls": [{"function": {"name": 1}}]}), "'name' and 'arguments'"),
        (chat(USER, ANSWER | {"tool_calls": [{"name": "a"}]}), "'arguments' must be an object"),
        (chat(USER, ANSWER | {"tool_calls": [{"name": "a", "arguments": "{"}]}), "'arguments' must be an object"),
        (chat(USER, ANSWER | {"tool_calls": [{"name": "a", "arguments": "[1]"}]}), "'arguments' must be an object"),
        (chat(USER, ANSWER, tools={"name": "add"}), "'tools' must be a list"),
        (chat(USER, ANSWER, tools=["add"]), "'tools' must be a list"),
        ({"input_ids": "12", "labels": [1, 2]}, "list of whole numbers"),
        ({"input_ids": [1, 2.0], "labels": [1, 2]}, "list of whole numbers"),
        ({"input_ids": [1, True], "labels": [1, 1]}, "list of whole numbers"),
        ({"input_ids": [1], "labels": [1]}, "2 are the least"),
        ({"input_ids": [], "labels": []}, "2 are the least"),
        ({"input_ids": [1, -2], "labels": [1, -2]}, "token id -2 is not within"),
        ({"input_ids": [1, 10], "labels": [1, 10]}, "token id 10 is not within the vocabulary of 10"),
        ({"input_ids": [1, 2], "labels": [1, 2], "loss_mask": [0, 1]}, "keep one"),
        ({"input_ids": [1, 2], "labels": [1]}, "as long as 'input_ids'"),
        ({"input_ids": [1, 2], "labels": None}, "as long as 'input_ids'"),
        ({"input_ids": [1, 2], "labels": [1, 3]}, "label 3 at position 1 is neither the token 2 nor -100"),
        ({"input_ids": [1, 2], "labels": [1, "2"]}, "label 2 at position 1"),
        ({"input_ids": [1, 2], "loss_mask": [0, 1, 1]}, "as long as 'input_ids'"),
        ({"input_ids": [1, 2], "loss_mask": [0, 2]}, "only 0 and 1"),
        ({"input_ids": [1, 2], "loss_mask": [0, 1.0]}, "only 0 and 1"),
        ({"input_ids": [1, 2], "loss_mask": 1}, "as long as 'input_ids'"),
    ],
)
def test_a_wrong_row_is_refused_with_its_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as raised:
        parse_row(row, "auto", 10)
    assert reason in str(raised.value)


def test_tokenized_rows_by_labels_and_by_mask_are_the_same_sample() -> None:
    expected = EncodedSample([4, 5, 6], [0, 0, 1])
    assert parse_row({"input_ids": [4, 5, 6], "labels": [-100, -100, 6]}, "auto", 10) == expected
    assert parse_row({"input_ids": [4, 5, 6], "loss_mask": [0, 0, 1]}, "tokenized", 10) == expected


def test_the_first_token_is_never_learnt() -> None:
    for key, value in {"labels": [4, 5], "loss_mask": [1, 1]}.items():
        sample = parse_row({"input_ids": [4, 5], key: value}, "auto", 10)
        assert sample == EncodedSample([4, 5], [0, 1])


def test_a_set_format_refuses_rows_of_the_other() -> None:
    with pytest.raises(RowError, match=r"a messages row where data\.format=tokenized"):
        parse_row(chat(USER, ANSWER), "tokenized", 10)
    with pytest.raises(RowError, match=r"a tokenized row where data\.format=messages"):
        parse_row({"input_ids": [1, 2], "labels": [1, 2]}, "messages", 10)
