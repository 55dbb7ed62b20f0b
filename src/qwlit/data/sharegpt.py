"""Parse ShareGPT turns, which have speakers instead of roles, and separate turns for tool calls."""

from typing import Any

from qwlit.data.conversation import Message, from_json_text, parse_tool_call
from qwlit.data.row_labels import MARK_KEYS, refuse_unsupported_row, turn_mark
from qwlit.data.rows import RowError, kind_of
from qwlit.data.unread import unread_keys

ROLES = {
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
    **dict.fromkeys(("observation", "tool", "function_response", "tool_response"), "tool"),
}
TURN_KEYS = {"from", "value", *MARK_KEYS}


def parse_turns(turns: list[Any]) -> list[Message]:
    """Parse turns. A call becomes a separate message, which `conversation_of` merges into the answer before it.

    Raises:
        RowError: a turn is wrong; the text has its number and the reason.
    """
    return [_turn(f"turn {number}", turn) for number, turn in enumerate(turns, start=1)]


def _turn(where: str, turn: object) -> Message:
    if not isinstance(turn, dict):
        raise RowError(f"{where} must be an object, not {kind_of(turn)}")
    speaker, text = turn.get("from"), turn.get("value")
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise RowError(f"{where}: from {str(speaker)[:30]!r} is none of {', '.join(ROLES)}")
    refuse_unsupported_row(turn, has_answer=role in ("assistant", "call"), where=f"{where}: ")
    if not isinstance(text, str):
        raise RowError(f"{where}: 'value' must be a string, not {kind_of(text)}")
    unread = tuple(unread_keys(turn, TURN_KEYS))
    mark = turn_mark(where, turn)
    if role != "call":
        return Message(role, text, mark=mark, unread_keys=unread)
    calls = from_json_text(text, f"{where}: a function call")
    listed = calls if isinstance(calls, list) else [calls]
    tool_calls = tuple(parse_tool_call(where, call) for call in listed)
    return Message("assistant", "", None, tool_calls, mark=mark, unread_keys=unread)
