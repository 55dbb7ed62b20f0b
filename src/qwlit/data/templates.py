"""How the Qwen families write a conversation down, piece by piece.

A piece is either text or a control token, and either learnt or only read. The pieces' texts, joined, equal what the
official chat template of the family renders. Only a template makes control pieces: what stands in a message is always
text, whatever it looks like.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from qwlit.data.config import LossOn, Thinking
from qwlit.data.conversation import END_THINK, THINK, Conversation, Message, ToolCall
from qwlit.data.rows import RowError

START, END = "<|im_start|>", "<|im_end|>"
TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"
RESPONSE, END_RESPONSE = "<tool_response>", "</tool_response>"


class Piece(NamedTuple):
    """A stretch of the rendered conversation."""

    text: str
    control: bool
    """The text is one control token, where the vocabulary has it."""
    supervised: bool


@dataclass(frozen=True)
class Supervision:
    """What of a conversation is learnt; see the settings of the same names."""

    loss_on: LossOn = "assistant"
    thinking: Thinking = "mask_empty"


@dataclass(frozen=True)
class Family:
    """What sets one family's template apart; all are ChatML."""

    name: str
    """As `data.template` has it."""
    default_system: str | None
    """The system message of a conversation that has none."""
    tools: bool = False
    thinking: bool = False
    json_text_arguments: bool = False
    """Arguments given as JSON text are written as they stand; otherwise as a quoted JSON string, as the official
    template does."""


FAMILIES = {
    family.name: family
    for family in (
        Family("qwen3", None, tools=True, thinking=True, json_text_arguments=True),
        # Qwen3-…-Instruct-2507: the non-thinking models. The thinking ones of that date write as qwen3 does.
        Family("qwen3_2507", None, tools=True, json_text_arguments=True),
        Family("qwen2_5", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", tools=True),
        # The base models of Qwen2.5.
        Family("qwen2_5_base", "You are a helpful assistant.", tools=True),
        # Last: it is told by what it does with conversations alone.
        Family("qwen2", "You are a helpful assistant."),
    )
}

TOOLS_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
TOOLS_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


def render(conversation: Conversation, family: Family, supervision: Supervision) -> list[Piece]:
    """Write the conversation down as the family does.

    Raises:
        RowError: the family would leave out what the conversation is about.
    """
    if supervision.thinking == "drop":
        conversation = replace(conversation, messages=tuple(m.without_thinking() for m in conversation.messages))
    _check(conversation, family)
    learns_all = supervision.loss_on == "all"
    return [
        piece._replace(supervised=True) if learns_all and (message is None or message.is_supervised) else piece
        for message, turn in _turns(conversation, family, supervision)
        for piece in turn
        if piece.text
    ]


def _check(conversation: Conversation, family: Family) -> None:
    messages = conversation.messages
    if not family.tools and (conversation.tools or any(m.role == "tool" or m.tool_calls for m in messages)):
        raise RowError(f"template {family.name} knows no tools")
    answers = [m for m in messages if m.role == "assistant"]
    if not all(m.says_something for m in answers):
        raise RowError("an assistant message holds only reasoning, which data.thinking=drop takes out")
    # Reasoning stands in the answers to the last query only, and in some families nowhere.
    shown_after = last_query_index(messages) if family.thinking else len(messages)
    for message in messages[: shown_after + 1]:
        if message.role == "assistant" and not (message.split_thinking()[1].strip() or message.tool_calls):
            raise RowError(f"an assistant message holds only reasoning, which template {family.name} leaves out")


def _text(text: str, supervised: bool = False) -> Piece:
    return Piece(text, control=False, supervised=supervised)


def _control(text: str, supervised: bool = False) -> Piece:
    return Piece(text, control=True, supervised=supervised)


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError(f"a tool or its arguments cannot be written as JSON: {error}") from None


@dataclass(frozen=True)
class _Mark:
    """Which parts of one answer are learnt."""

    answer: bool
    empty_block: bool


def _turns(
    conversation: Conversation, family: Family, supervision: Supervision
) -> Iterator[tuple[Message | None, Iterator[Piece]]]:
    """Yield each message with its pieces; the system turn may be the template's own."""
    messages = conversation.messages
    roles = ["", *(message.role for message in messages), ""]
    last_query = last_query_index(messages)
    last_answer = max(index for index, message in enumerate(messages) if message.role == "assistant")
    yield (messages[0] if messages[0].role == "system" else None), _system(conversation, family)
    for index, message in enumerate(messages):
        if message.role == "assistant":
            learnt = message.is_supervised and (supervision.loss_on != "last_assistant" or index == last_answer)
            # An empty block stands in the prompt where thinking is off: the model reads it and need not write it.
            mark = _Mark(learnt, learnt and supervision.thinking == "keep")
            yield message, _answer(message, family, index > last_query, index == len(messages) - 1, mark)
        elif message.role == "tool":
            # Responses that follow each other share one turn of the user.
            yield message, _response(message, opens=roles[index] != "tool", closes=roles[index + 2] != "tool")
        elif message.role == "user" or index > 0:
            yield message, _said(message)


def _said(message: Message) -> Iterator[Piece]:
    yield from (_control(START), _text(f"{message.role}\n{message.content}"), _control(END), _text("\n"))


def _response(message: Message, *, opens: bool, closes: bool) -> Iterator[Piece]:
    yield from (_control(START), _text("user")) if opens else ()
    yield from (_text("\n"), _control(RESPONSE), _text(f"\n{message.content}\n"), _control(END_RESPONSE))
    yield from (_control(END), _text("\n")) if closes else ()


def last_query_index(messages: tuple[Message, ...]) -> int:
    """Return the index of the last message of a user; the last message's where there is none."""
    return max((i for i, message in enumerate(messages) if message.role == "user"), default=len(messages) - 1)


def _system(conversation: Conversation, family: Family) -> Iterator[Piece]:
    first = conversation.messages[0]
    system = first.content if first.role == "system" else family.default_system
    if system is None and not conversation.tools:
        return
    yield from (_control(START), _text("system\n"))
    if system is not None:
        yield _text(system)
    if conversation.tools:
        yield _text("\n\n" if system is not None else "")
        yield from _wording(TOOLS_HEAD)
        yield from (_text(f"\n{_json(tool)}") for tool in conversation.tools)
        yield from _wording(TOOLS_TAIL)
    yield from (_control(END), _text("\n"))


def _wording(text: str) -> Iterator[Piece]:
    """The template's own words, in which the names of the tags are control tokens to a tokenizer."""
    for part in re.split(f"({TOOL_CALL}|{END_TOOL_CALL})", text):
        yield Piece(part, control=part in (TOOL_CALL, END_TOOL_CALL), supervised=False)


def _answer(message: Message, family: Family, after_query: bool, is_last: bool, mark: _Mark) -> Iterator[Piece]:
    reasoning, content = message.split_thinking() if family.thinking else ("", message.content)
    learnt, shown = mark.answer, content
    yield from (_control(START), _text("assistant\n"))
    if family.thinking and after_query and (is_last or reasoning):
        reasoning, shown = reasoning.strip("\n"), content.lstrip("\n")
        block = learnt if reasoning else mark.empty_block
        yield from (_control(THINK, block), _text(f"\n{reasoning}\n", block))
        yield from (_control(END_THINK, block), _text("\n\n", block))
    yield _text(shown, learnt)
    for number, call in enumerate(message.tool_calls):
        yield _text("\n" if content or number else "", learnt)
        yield _control(TOOL_CALL, learnt)
        yield _text(f'\n{{"name": "{call.name}", "arguments": {_arguments(call, family)}}}\n', learnt)
        yield _control(END_TOOL_CALL, learnt)
    yield from (_control(END, learnt), _text("\n"))


def _arguments(call: ToolCall, family: Family) -> str:
    if isinstance(call.arguments, str) and family.json_text_arguments:
        return call.arguments
    return _json(call.arguments)
