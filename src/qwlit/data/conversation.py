"""A conversation and its parts, checked one by one."""

from dataclasses import dataclass, field, replace
from typing import Any

from qwlit.core.errors import nearest
from qwlit.data.meaning import MARK_KEYS, mark_of, refuse_other_meaning, refuse_placeholder
from qwlit.data.rows import RowError, kind_of, parse_json
from qwlit.data.unread import has_value

ROLES = ("system", "user", "assistant", "tool")
# OpenAI's older and newer names for the same.
ROLE_NAMES = {"function": "tool", "developer": "system"}
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
MESSAGE_KEYS = {"role", "content", "tool_calls", "function_call", *MARK_KEYS, *REASONING_KEYS}
# Names of speakers and calls, which no Qwen template writes down.
MESSAGE_KEYS |= {"name", "tool_call_id", "id"}
PART_KEYS = {"type", "text", "value"}
THINK, END_THINK = "<think>", "</think>"


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
    """None where the row has no `reasoning_content`; then a <think> block may open the content."""
    tool_calls: tuple[ToolCall, ...] = ()
    mark: bool | None = None
    """Whether the row marks it as supervised; None where it does not say."""
    not_read: tuple[str, ...] = ()
    """Keys of the row's message that nobody knows."""

    @property
    def is_supervised(self) -> bool:
        """Whether the row leaves it to the settings; an answer marked otherwise is read, not supervised."""
        return self.mark is not False

    def split_thinking(self) -> tuple[str, str]:
        """Return reasoning and answer. A <think> block that opens the content is reasoning; elsewhere it is text."""
        if self.reasoning is not None or not self.content.lstrip().startswith(THINK) or END_THINK not in self.content:
            return self.reasoning or "", self.content
        thought, _, answer = self.content.lstrip().removeprefix(THINK).partition(END_THINK)
        return thought.strip("\n"), answer.lstrip("\n")

    def without_thinking(self) -> "Message":
        return replace(self, reasoning=None, content=self.split_thinking()[1])

    @property
    def says_something(self) -> bool:
        return bool(self.content.strip() or self.tool_calls or (self.reasoning or "").strip())


@dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    has_bare_tools: bool = field(default=False, compare=False)
    """Some of the tools were definitions without {"type": "function"} around them."""


def parse_conversation(rows: object, tools: object = None) -> Conversation:
    """Check a list of messages and the tools they may use.

    Raises:
        RowError: naming the message and what is wrong with it.
    """
    return conversation_of(message_list(rows), tools)


def message_list(rows: object) -> list[Message]:
    """Check a list of messages one by one, or raise RowError."""
    if not isinstance(rows, list) or not rows:
        raise RowError(f"'messages' must be a list with at least one message, not {seen(rows)}")
    return [_message(f"message {number}", row) for number, row in enumerate(rows, start=1)]


def conversation_of(messages: list[Message], tools: object = None) -> Conversation:
    """Put messages and tools together, or raise RowError."""
    messages = _join_calls(messages)
    if all(message.role != "assistant" for message in messages):
        raise RowError("no assistant message: there is nothing to learn")
    for number, message in enumerate(messages, start=1):
        if message.role == "assistant" and not message.says_something:
            raise RowError(f"message {number}: the assistant says nothing")
        if message.role in ("user", "system"):
            refuse_placeholder(f"message {number}", message.content)
    given = parse_tools(tools)
    wrapped = tuple(map(_wrapped, given))
    return Conversation(tuple(messages), wrapped, has_bare_tools=wrapped != given)


def _join_calls(messages: list[Message]) -> list[Message]:
    """Join a message that only calls tools to the answer directly before it: the model writes both in one turn.

    Raises:
        RowError: the two are marked differently.
    """
    joined: list[Message] = []
    for number, message in enumerate(messages, start=1):
        only_calls = message.tool_calls and not message.content.strip() and not message.reasoning
        if only_calls and joined and joined[-1].role == "assistant":
            joined[-1] = _joined(f"message {number}", joined[-1], message)
        else:
            joined.append(message)
    return joined


def _joined(where: str, answer: Message, call: Message) -> Message:
    if answer.is_supervised != call.is_supervised:
        raise RowError(f"{where}: is one answer with the message before it, but marked otherwise; mark both alike")
    return replace(
        answer,
        tool_calls=answer.tool_calls + call.tool_calls,
        mark=call.mark if answer.mark is None else answer.mark,
        not_read=answer.not_read + call.not_read,
    )


def seen(value: object) -> str:
    return "an empty one" if value == [] else kind_of(value)


def parse_tools(tools: object) -> tuple[dict[str, Any], ...]:
    """Read tool definitions: a list of objects, or JSON text of one."""
    value = from_json_text(tools, "'tools'") or []
    if not isinstance(value, list | tuple) or not all(isinstance(tool, dict) for tool in value):
        raise RowError("'tools' must be a list of objects")
    return tuple(value)


def _wrapped(tool: dict[str, Any]) -> dict[str, Any]:
    """Return the definition as {"type": "function", "function": …}, the form in which servers render it."""
    if tool.get("type") not in (None, "function"):
        return tool
    if isinstance(tool.get("function"), dict):
        return {"type": "function", **{key: value for key, value in tool.items() if key != "type"}}
    if not isinstance(tool.get("name"), str) or tool.get("function") is not None:
        return tool
    return {"type": "function", "function": {k: v for k, v in tool.items() if k not in ("type", "function")}}


def from_json_text(value: object, what: str) -> Any:
    """Return what a JSON text holds (a CSV has nothing but texts); anything else, and an empty text, as it is."""
    if not isinstance(value, str) or not value.strip():
        return None if isinstance(value, str) else value
    try:
        return parse_json(value)
    except RowError as error:
        reason = str(error).removeprefix("not valid JSON: ")
        raise RowError(f"{what} is a text, but no JSON: {reason}") from None


def _message(where: str, row: object) -> Message:
    if not isinstance(row, dict):
        raise RowError(f"{where} must be an object, not {kind_of(row)}")
    role = ROLE_NAMES.get(str(row.get("role")), row.get("role"))
    if role not in ROLES:
        raise RowError(f"{where}: role {str(role)[:30]!r} is none of {', '.join(ROLES)}.{nearest(str(role), ROLES)}")
    refuse_other_meaning(row, has_answer=role == "assistant", where=f"{where}: ")
    reasoning = _reasoning(where, role, row)
    tool_calls = _tool_calls(where, role, row)
    silent = row.get("content") is None and (tool_calls or reasoning)
    content = "" if silent else _content(where, row.get("content"))
    not_read = [str(key) for key, value in row.items() if key not in MESSAGE_KEYS and has_value(value)]
    not_read += _unread_of_parts(row.get("content"))
    return Message(role, content, reasoning, tool_calls, mark=mark_of(where, row), not_read=tuple(sorted(not_read)))


def _tool_calls(where: str, role: str, row: dict[str, Any]) -> tuple[ToolCall, ...]:
    if row.get("tool_calls") and row.get("function_call"):
        raise RowError(f"{where}: has both 'tool_calls' and 'function_call'; keep one")
    calls = row.get("tool_calls") or ([row["function_call"]] if row.get("function_call") else [])
    if not isinstance(calls, list) or (calls and role != "assistant"):
        raise RowError(f"{where}: 'tool_calls' must be a list, and only an assistant has them")
    return tuple(parse_tool_call(where, call) for call in calls)


def _reasoning(where: str, role: str, row: dict[str, Any]) -> str | None:
    found = {key: row[key] for key in REASONING_KEYS if row.get(key) is not None}
    for key, reasoning in found.items():
        if not isinstance(reasoning, str):
            raise RowError(f"{where}: '{key}' must be a string, not {kind_of(reasoning)}")
        if role != "assistant":
            raise RowError(f"{where}: only an assistant has '{key}'")
    if len(found) > 1:
        raise RowError(f"{where}: has {' and '.join(found)}; keep one")
    return next(iter(found.values()), None)


def _content(where: str, content: object) -> str:
    """Return the text of a string or of a list of text parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        other = [str(part.get("type"))[:30] for part in content if part.get("type", "text") != "text"]
        texts = [_part_text(part) for part in content]
        if other or not all(isinstance(text, str) for text in texts):
            raise RowError(f"{where}: only parts of type 'text' can be trained on, not {', '.join(other) or 'others'}")
        if any(has_value(part.get("value")) and part["value"] != _part_text(part) for part in content):
            raise RowError(f"{where}: a part has 'text' and 'value' that differ; keep one")
        return "".join(map(str, texts))
    raise RowError(f"{where}: 'content' must be a string or a list of text parts, not {kind_of(content)}")


def _part_text(part: dict[str, Any]) -> object:
    """Return a part's `text`, or ms-swift's and others' `value`."""
    return part["text"] if part.get("text") is not None else part.get("value")


def _unread_of_parts(content: object) -> list[str]:
    if not isinstance(content, list):
        return []
    return [
        f"content.{key}" for part in content for key, value in part.items() if key not in PART_KEYS and has_value(value)
    ]


def parse_tool_call(where: str, call: object) -> ToolCall:
    """Read {"name": …, "arguments": …}, alone or under "function", or raise RowError."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(f"{where}: a tool call must have a 'name' and 'arguments'")
    arguments = function.get("arguments")
    try:
        parsed = parse_json(arguments) if isinstance(arguments, str) else arguments
    except RowError:
        parsed = None
    if not isinstance(parsed, dict) or not isinstance(arguments, dict | str):
        raise RowError(f"{where}: a tool call's 'arguments' must be an object, or JSON text of one")
    return ToolCall(function["name"], arguments)
