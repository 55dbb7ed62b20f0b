"""What a row may be: a conversation or a tokenized sample, checked part by part."""

import json
from dataclasses import dataclass
from typing import Any

from qwlit.core.errors import DataError
from qwlit.data.config import RowFormat

ROLES = ("system", "user", "assistant", "tool")
IGNORED_LABEL = -100


class RowError(ValueError):
    """One row cannot be used; the message is the reason that its quarantine records."""


class NeedsTokenizer(DataError):
    """A conversation where there is no tokenizer to encode it."""


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: dict[str, Any] | str
    """As the row has them: an object, or JSON text of one. Templates write the two differently."""


@dataclass(frozen=True)
class Message:
    role: str
    content: str
    reasoning: str | None = None
    """None where the row has no `reasoning_content`; then a <think> block may stand in the content."""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class EncodedSample:
    """A sample as tokens: two lists of T numbers."""

    input_ids: list[int]
    loss_mask: list[int]
    """1 where the token is learnt; the first token is nobody's target and always 0."""


def parse_row(value: dict[str, Any], row_format: RowFormat, vocab_size: int) -> Conversation | EncodedSample:
    """Recognise the row's shape by its keys and check every part of it.

    Raises:
        RowError: it has no known shape, another one than `row_format` allows, or something in it is wrong.
    """
    if "messages" in value:
        found = "messages"
    elif "input_ids" in value and ("labels" in value or "loss_mask" in value):
        found = "tokenized"
    else:
        keys = ", ".join(repr(key[:30]) for key in list(value)[:8]) or "none"
        raise RowError(f"unknown shape: keys {keys}; expected 'messages', or 'input_ids' with 'labels' or 'loss_mask'")
    if row_format not in ("auto", found):
        raise RowError(f"a {found} row where data.format={row_format}")
    return parse_conversation(value) if found == "messages" else parse_tokenized(value, vocab_size)


def parse_conversation(value: dict[str, Any]) -> Conversation:
    """Read `messages` and `tools`, or raise RowError."""
    rows, tools = value["messages"], value.get("tools") or []
    if not isinstance(rows, list) or not rows:
        raise RowError("'messages' must be a list with at least one message")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("'tools' must be a list of objects")
    messages = tuple(_message(f"message {number}", row) for number, row in enumerate(rows, start=1))
    if any(message.role == "system" for message in messages[1:]):
        raise RowError("a system message may only stand first")
    if all(message.role != "assistant" for message in messages):
        raise RowError("no assistant message: there is nothing to learn")
    return Conversation(messages, tuple(tools))


def _message(where: str, row: object) -> Message:
    if not isinstance(row, dict):
        raise RowError(f"{where} must be an object, not {kind_of(row)}")
    role = row.get("role")
    if role not in ROLES:
        raise RowError(f"{where}: role {str(role)[:30]!r} is none of {', '.join(ROLES)}")
    reasoning = row.get("reasoning_content")
    if not isinstance(reasoning, str | None):
        raise RowError(f"{where}: 'reasoning_content' must be a string, not {kind_of(reasoning)}")
    calls = row.get("tool_calls") or []
    if not isinstance(calls, list) or (calls and role != "assistant"):
        raise RowError(f"{where}: 'tool_calls' must be a list, and only an assistant has them")
    tool_calls = tuple(_tool_call(where, call) for call in calls)
    if row.get("content") is None and calls:
        return Message(role, "", reasoning, tool_calls)
    content = _content(where, row.get("content"))
    if role == "assistant" and not (content.strip() or calls or (reasoning or "").strip()):
        raise RowError(f"{where}: the assistant says nothing")
    return Message(role, content, reasoning, tool_calls)


def _content(where: str, content: object) -> str:
    """Return the text of a string or of a list of text parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        if any(part.get("type", "text") != "text" for part in content):
            raise RowError(f"{where}: only parts of type 'text' can be trained on")
        return "".join(part["text"] for part in content)
    raise RowError(f"{where}: 'content' must be a string or a list of text parts, not {kind_of(content)}")


def _tool_call(where: str, call: object) -> ToolCall:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(f"{where}: a tool call must have a 'name' and 'arguments'")
    arguments = function.get("arguments")
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict) or not isinstance(arguments, dict | str):
        raise RowError(f"{where}: a tool call's 'arguments' must be an object, or JSON text of one")
    return ToolCall(function["name"], arguments)


def parse_tokenized(value: dict[str, Any], vocab_size: int) -> EncodedSample:
    """Read `input_ids` with `labels` or `loss_mask`, or raise RowError.

    Args:
        vocab_size: ids must lie below it.
    """
    ids = value["input_ids"]
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise RowError("'input_ids' must be a list of whole numbers")
    if len(ids) < 2:
        raise RowError(f"'input_ids' has {len(ids)} tokens; the first is never learnt, so 2 are the least")
    if min(ids) < 0 or max(ids) >= vocab_size:
        wrong = next(token for token in ids if not 0 <= token < vocab_size)
        raise RowError(f"token id {wrong} is not within the vocabulary of {vocab_size}")
    if "labels" in value and "loss_mask" in value:
        raise RowError("has both 'labels' and 'loss_mask'; keep one")
    mask = _mask_of_labels(ids, value["labels"]) if "labels" in value else value["loss_mask"]
    if not isinstance(mask, list) or len(mask) != len(ids):
        raise RowError(f"'loss_mask' must be a list as long as 'input_ids' ({len(ids)})")
    if not all(type(flag) is int and flag in (0, 1) for flag in mask):
        raise RowError("'loss_mask' may hold only 0 and 1")
    return EncodedSample(ids, [0, *mask[1:]])


def _mask_of_labels(ids: list[int], labels: object) -> list[int]:
    if not isinstance(labels, list) or len(labels) != len(ids):
        raise RowError(f"'labels' must be a list as long as 'input_ids' ({len(ids)})")
    for position, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if type(label) is not int or label not in (IGNORED_LABEL, token):
            raise RowError(f"label {str(label)[:30]} at position {position} is neither the token {token} nor -100")
    return [int(label != IGNORED_LABEL) for label in labels]


def kind_of(value: object) -> str:
    """Name a JSON value's kind for a message."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
