"""A conversation: its data classes, and the functions that parse and check one."""

from dataclasses import dataclass, field, replace
from typing import Any

from qwlit.core.errors import nearest
from qwlit.data.row_labels import MARK_KEYS, refuse_placeholder, refuse_unsupported_row, turn_mark
from qwlit.data.rows import RowError, kind_of, parse_json
from qwlit.data.unread import has_value, unread_keys

ROLES = ("system", "user", "assistant", "tool")
# Older and newer names from OpenAI for the same roles.
ROLE_NAMES = {"function": "tool", "developer": "system"}
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
MESSAGE_KEYS = {"role", "content", "tool_calls", "function_call", *MARK_KEYS, *REASONING_KEYS}
# No Qwen template uses these keys, so they need no remark.
MESSAGE_KEYS |= {"name", "tool_call_id", "id"}
PART_KEYS = {"type", "text", "value"}
THINK, END_THINK = "<think>", "</think>"


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: dict[str, Any] | str
    """Unchanged from the row: an object, or JSON text of one. Some templates write the two differently."""


@dataclass(frozen=True)
class Message:
    role: str
    content: str
    reasoning: str | None = None
    """None if the row has no `reasoning_content`; then the content may begin with a <think> block."""
    tool_calls: tuple[ToolCall, ...] = ()
    mark: bool | None = None
    """Whether the row marks the turn as supervised; None if it has no mark."""
    unread_keys: tuple[str, ...] = ()
    """Keys with a value that qwlit does not read."""

    @property
    def is_supervised(self) -> bool:
        """False if the row marks the turn as not supervised; otherwise `data.loss_on` decides."""
        return self.mark is not False

    def split_thinking(self) -> tuple[str, str]:
        """Return reasoning and answer. A <think> block at the start of the content is reasoning, elsewhere text."""
        if self.reasoning is not None or not self.content.lstrip().startswith(THINK) or END_THINK not in self.content:
            return self.reasoning or "", self.content
        thought, _, answer = self.content.lstrip().removeprefix(THINK).partition(END_THINK)
        return thought.strip("\n"), answer.lstrip("\n")

    def without_thinking(self) -> "Message":
        return replace(self, reasoning=None, content=self.split_thinking()[1])

    @property
    def is_empty(self) -> bool:
        """Whether the message has no text, no tool calls and no reasoning."""
        return not (self.content.strip() or self.tool_calls or (self.reasoning or "").strip())


@dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    has_bare_tools: bool = field(default=False, compare=False)
    """Whether the row had a tool without {"type": "function", …} around it."""


def parse_conversation(messages: object, tools: object = None) -> Conversation:
    """Check a list of messages and their tools.

    Raises:
        RowError: a message is wrong; the text has its number and the reason.
    """
    return conversation_of(message_list(messages), parse_tools(tools))


def message_list(values: object) -> list[Message]:
    """Parse and check a list of messages, or raise RowError."""
    if not isinstance(values, list) or not values:
        raise RowError(f"'messages' must be a list with at least one message, not {kind_or_empty(values)}")
    return [_message(f"message {number}", value) for number, value in enumerate(values, start=1)]


def conversation_of(messages: list[Message], tools: list[dict[str, Any]]) -> Conversation:
    """Check the messages as a whole and wrap the tools, or raise RowError."""
    # Merge first: an empty answer is allowed if a message with tool calls follows it.
    messages = _merge_calls(messages)
    if all(message.role != "assistant" for message in messages):
        raise RowError("no assistant message: there is no answer to train on")
    for number, message in enumerate(messages, start=1):
        if message.role == "assistant" and message.is_empty:
            raise RowError(f"message {number}: the assistant message is empty")
        if message.role in ("user", "system"):
            refuse_placeholder(f"message {number}", message.content)
    wrapped = list(map(_wrap_tool, tools))
    return Conversation(tuple(messages), tuple(wrapped), has_bare_tools=wrapped != tools)


def _merge_calls(messages: list[Message]) -> list[Message]:
    """Merge a message with only tool calls into the answer directly before it: the model writes both in one turn.

    Raises:
        RowError: the two have different marks.
    """
    merged: list[Message] = []
    for number, message in enumerate(messages, start=1):
        only_calls = message.tool_calls and not message.content.strip() and not message.reasoning
        if only_calls and merged and merged[-1].role == "assistant":
            merged[-1] = _merge(f"message {number}", merged[-1], message)
        else:
            merged.append(message)
    return merged


def _merge(where: str, answer: Message, call: Message) -> Message:
    if answer.is_supervised != call.is_supervised:
        raise RowError(f"{where}: belongs to the answer before it, but its mark differs; mark both in the same way")
    return replace(
        answer,
        tool_calls=answer.tool_calls + call.tool_calls,
        mark=call.mark if answer.mark is None else answer.mark,
        unread_keys=answer.unread_keys + call.unread_keys,
    )


def kind_or_empty(value: object) -> str:
    """Return the type in words; for an empty list say that it is empty."""
    return "an empty one" if value == [] else kind_of(value)


def parse_tools(tools: object) -> list[dict[str, Any]]:
    """Parse tool definitions: a list of objects, or JSON text of one."""
    value = from_json_text(tools, "'tools'") or []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError("'tools' must be a list of objects")
    return value


def _wrap_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """Return the tool as {"type": "function", "function": …}, the form that inference servers pass to the template."""
    if tool.get("type") not in (None, "function"):
        return tool
    if isinstance(tool.get("function"), dict):
        return {"type": "function", **{key: value for key, value in tool.items() if key != "type"}}
    if not isinstance(tool.get("name"), str) or tool.get("function") is not None:
        return tool
    return {"type": "function", "function": {k: v for k, v in tool.items() if k not in ("type", "function")}}


def from_json_text(value: object, what: str) -> Any:
    """Parse a JSON text (CSV cells can only be texts). Return other values unchanged, and None for an empty text."""
    if not isinstance(value, str) or not value.strip():
        return None if isinstance(value, str) else value
    try:
        return parse_json(value)
    except RowError as error:
        reason = str(error).removeprefix("not valid JSON: ")
        raise RowError(f"{what} is a text, but not valid JSON: {reason}") from None


def _message(where: str, message: object) -> Message:
    if not isinstance(message, dict):
        raise RowError(f"{where} must be an object, not {kind_of(message)}")
    if message.get("role") is None:
        hint = "; for 'from' and 'value', read the column as conversations: data.columns='{conversations: messages}'"
        raise RowError(f"{where}: the key 'role' is missing{hint if 'from' in message else ''}")
    role = ROLE_NAMES.get(str(message["role"]), message["role"])
    if role not in ROLES:
        raise RowError(f"{where}: role {str(role)[:30]!r} is none of {', '.join(ROLES)}.{nearest(str(role), ROLES)}")
    refuse_unsupported_row(message, has_answer=role == "assistant", where=f"{where}: ")
    reasoning = _reasoning(where, role, message)
    tool_calls = _tool_calls(where, role, message)
    may_lack_content = message.get("content") is None and (tool_calls or reasoning)
    content = "" if may_lack_content else _content(where, message.get("content"))
    parts = message["content"] if isinstance(message.get("content"), list) else []
    unread = unread_keys(message, MESSAGE_KEYS)
    unread += [f"content.{key}" for part in parts for key in unread_keys(part, PART_KEYS)]
    return Message(role, content, reasoning, tool_calls, mark=turn_mark(where, message), unread_keys=tuple(unread))


def _tool_calls(where: str, role: str, message: dict[str, Any]) -> tuple[ToolCall, ...]:
    if message.get("tool_calls") and message.get("function_call"):
        raise RowError(f"{where}: has both 'tool_calls' and 'function_call'; keep one")
    calls = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else [])
    if not isinstance(calls, list) or (calls and role != "assistant"):
        raise RowError(f"{where}: 'tool_calls' must be a list, and only an assistant message may have them")
    return tuple(parse_tool_call(where, call) for call in calls)


def _reasoning(where: str, role: str, message: dict[str, Any]) -> str | None:
    values = {key: message[key] for key in REASONING_KEYS if message.get(key) is not None}
    for key, reasoning in values.items():
        if not isinstance(reasoning, str):
            raise RowError(f"{where}: '{key}' must be a string, not {kind_of(reasoning)}")
        if role != "assistant":
            raise RowError(f"{where}: only an assistant message may have '{key}'")
    if len(values) > 1:
        raise RowError(f"{where}: has {' and '.join(values)}; keep one")
    return next(iter(values.values()), None)


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
    """Return the `text` of a part, or its `value`, which ms-swift and other tools write."""
    return part["text"] if part.get("text") is not None else part.get("value")


def parse_tool_call(where: str, call: object) -> ToolCall:
    """Parse {"name": …, "arguments": …}, directly or under "function", or raise RowError."""
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
