"""How Qwen2, Qwen2.5 and Qwen3 write a conversation down, piece by piece.

A piece is either text or a control token, and either learnt or only read. The pieces' texts, joined, equal what the
official chat template of the family renders. Only a template makes control pieces: what stands in a message is always
text, whatever it looks like.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from qwlit.core.errors import DataError
from qwlit.data.rows import Conversation, Message, RowError, ToolCall, parse_conversation

START, END = "<|im_start|>", "<|im_end|>"
THINK, END_THINK = "<think>", "</think>"
TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"
RESPONSE, END_RESPONSE = "<tool_response>", "</tool_response>"
CONTROL_TOKENS = {START, END, THINK, END_THINK, TOOL_CALL, END_TOOL_CALL, RESPONSE, END_RESPONSE}
REMEDY = "set data.template=qwen2, qwen2_5 or qwen3"


@dataclass(frozen=True)
class Piece:
    """A stretch of the rendered conversation."""

    text: str
    control: bool
    """The text is one control token, where the vocabulary has it."""
    supervised: bool


@dataclass(frozen=True)
class Family:
    """What sets one family's template apart; all are ChatML."""

    default_system: str | None
    """The system message of a conversation that has none."""
    tools: bool = False
    thinking: bool = False
    json_text_arguments: bool = False
    """Arguments given as JSON text are written as they stand; otherwise as a quoted JSON string, as the official
    template does."""


FAMILIES = {
    "qwen3": Family(None, tools=True, thinking=True, json_text_arguments=True),
    "qwen2_5": Family("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", tools=True),
    "qwen2": Family("You are a helpful assistant."),
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


def check(conversation: Conversation, template: str) -> None:
    """Raise RowError where the family's template would leave out what the conversation is about."""
    family = FAMILIES[template]
    messages = conversation.messages
    if not family.tools and (conversation.tools or any(m.role == "tool" or m.tool_calls for m in messages)):
        raise RowError(f"template {template} knows no tools")
    answers = [m for m in messages if m.role == "assistant"]
    if not family.thinking and not all(m.content.strip() or m.tool_calls for m in answers):
        raise RowError(f"an assistant message holds only reasoning, which template {template} leaves out")


def render(conversation: Conversation, template: str) -> list[Piece]:
    """Write the conversation down in the template's family.

    Raises:
        RowError: the family cannot express it.
    """
    check(conversation, template)
    return [piece for piece in _pieces(conversation, FAMILIES[template]) if piece.text]


def _text(text: str, supervised: bool = False) -> Piece:
    return Piece(text, control=False, supervised=supervised)


def _control(text: str, supervised: bool = False) -> Piece:
    return Piece(text, control=True, supervised=supervised)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _pieces(conversation: Conversation, family: Family) -> Iterator[Piece]:
    messages = conversation.messages
    roles = ["", *(message.role for message in messages), ""]
    last_query = _last_query(messages)
    yield from _system(conversation, family)
    for index, message in enumerate(messages):
        if message.role == "user":
            yield from (_control(START), _text(f"user\n{message.content}"), _control(END), _text("\n"))
        elif message.role == "assistant":
            yield from (_control(START), _text("assistant\n"))
            is_last = index == len(messages) - 1
            yield from _answer(message, family, after_query=index > last_query, is_last=is_last)
            yield from (_control(END, supervised=True), _text("\n"))
        elif message.role == "tool":
            # Responses that follow each other share one turn of the user.
            before, after = roles[index], roles[index + 2]
            yield from (_control(START), _text("user")) if before != "tool" else ()
            yield from (_text("\n"), _control(RESPONSE), _text(f"\n{message.content}\n"), _control(END_RESPONSE))
            yield from (_control(END), _text("\n")) if after != "tool" else ()


def _last_query(messages: tuple[Message, ...]) -> int:
    """Return the index of the last message that a user wrote; the last message's where there is none."""

    def is_query(message: Message) -> bool:
        wrapped = message.content.startswith(RESPONSE) and message.content.endswith(END_RESPONSE)
        return message.role == "user" and not wrapped

    return max((i for i, message in enumerate(messages) if is_query(message)), default=len(messages) - 1)


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


def _answer(message: Message, family: Family, *, after_query: bool, is_last: bool) -> Iterator[Piece]:
    content = message.content
    if family.thinking:
        reasoning, content = _split_thinking(message)
        shown = content
        if after_query and (is_last or reasoning):
            yield from _think_block(reasoning.strip("\n"))
            shown = content.lstrip("\n")
        yield _text(shown, supervised=True)
    else:
        yield _text(content, supervised=True)
    for number, call in enumerate(message.tool_calls):
        yield _text("\n" if content or number else "", supervised=True)
        yield _control(TOOL_CALL, supervised=True)
        yield _text(f'\n{{"name": "{call.name}", "arguments": {_arguments(call, family)}}}\n', supervised=True)
        yield _control(END_TOOL_CALL, supervised=True)


def _think_block(reasoning: str) -> Iterator[Piece]:
    # An empty block stands in the prompt where thinking is off: the model reads it and never writes it.
    learnt = bool(reasoning)
    yield _control(THINK, supervised=learnt)
    yield _text(f"\n{reasoning}\n", supervised=learnt)
    yield _control(END_THINK, supervised=learnt)
    yield _text("\n\n", supervised=learnt)


def _split_thinking(message: Message) -> tuple[str, str]:
    """Return reasoning and answer; where the row has no reasoning of its own, a <think> block in the content is it."""
    content = message.content
    if message.reasoning is not None or END_THINK not in content:
        return message.reasoning or "", content
    parts = content.split(END_THINK)
    return parts[0].rstrip("\n").split(THINK)[-1].lstrip("\n"), parts[-1].lstrip("\n")


def _arguments(call: ToolCall, family: Family) -> str:
    if isinstance(call.arguments, str) and family.json_text_arguments:
        return call.arguments
    return _json(call.arguments)


_TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
_CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "二"}}}
_CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "<think>\nfirst\n</think>\n\nEins."},
    {"role": "user", "content": "And two?"},
    {"role": "assistant", "content": "Zwei.", "reasoning_content": "second"},
]
_TOOL_CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "1 + 二?"},
    {"role": "assistant", "content": "Adding.", "reasoning_content": "call it", "tool_calls": [_CALL, _CALL]},
    {"role": "tool", "content": "3"},
    {"role": "tool", "content": "three"},
    {"role": "assistant", "content": "Three."},
]
_SYSTEM: dict[str, Any] = {"role": "system", "content": "Be brief."}
_PROBES: tuple[tuple[list[dict[str, Any]], list[dict[str, Any]] | None], ...] = (
    (_CHAT, None),
    ([_SYSTEM, *_CHAT], None),
    (_TOOL_CHAT, [_TOOL]),
    ([_SYSTEM, *_TOOL_CHAT], [_TOOL]),
)

RenderJinja = Callable[[list[dict[str, Any]], list[dict[str, Any]] | None], str]


def recognise_template(render_jinja: RenderJinja | None) -> str:
    """Return the family whose pieces join to exactly what the tokenizer's own Jinja renders for a few conversations.

    Args:
        render_jinja: (messages, tools) -> text; None for a tokenizer without a chat template.

    Raises:
        DataError: there is no template, or it is none of the known ones.
    """
    if render_jinja is None:
        raise DataError(f"the tokenizer has no chat template; {REMEDY}")
    for template in FAMILIES:
        if _agrees(template, render_jinja):
            return template
    raise DataError(f"the tokenizer's chat template is none of {', '.join(FAMILIES)}; to train with one, {REMEDY}")


def _agrees(template: str, render_jinja: RenderJinja) -> bool:
    for messages, tools in _PROBES:
        if tools and not FAMILIES[template].tools:
            continue
        conversation = parse_conversation({"messages": messages, "tools": tools})
        try:
            rendered = render_jinja(messages, tools)
        except Exception:  # a template of strangers may fail in any way: then it is not this one
            return False
        if rendered != "".join(piece.text for piece in render(conversation, template)):
            return False
    return True
