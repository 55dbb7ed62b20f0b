"""The turns of ShareGPT: speakers instead of roles, and calls as turns of their own."""

from typing import Any

from qwlit.data.conversation import Message, from_json_text, parse_tool_call
from qwlit.data.meaning import MARK_KEYS, mark_of, refuse_other_meaning
from qwlit.data.rows import RowError, kind_of
from qwlit.data.unread import has_value

ROLES = {
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
    **dict.fromkeys(("observation", "tool", "function_response", "tool_response"), "tool"),
}
TURN_KEYS = {"from", "value", *MARK_KEYS}


def parse_turns(turns: list[Any]) -> list[Message]:
    """Read turns; a call is a message of its own, which `conversation_of` joins to the answer before it.

    Raises:
        RowError: naming the turn and what is wrong with it.
    """
    return [_turn(f"turn {number}", turn) for number, turn in enumerate(turns, start=1)]


def _turn(where: str, turn: object) -> Message:
    if not isinstance(turn, dict):
        raise RowError(f"{where} must be an object, not {kind_of(turn)}")
    speaker, text = turn.get("from"), turn.get("value")
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise RowError(f"{where}: from {str(speaker)[:30]!r} is none of {', '.join(ROLES)}")
    refuse_other_meaning(turn, has_answer=role in ("assistant", "call"), where=f"{where}: ")
    if not isinstance(text, str):
        raise RowError(f"{where}: 'value' must be a string, not {kind_of(text)}")
    not_read = tuple(sorted(str(key) for key, value in turn.items() if key not in TURN_KEYS and has_value(value)))
    mark = mark_of(where, turn)
    if role != "call":
        return Message(role, text, mark=mark, not_read=not_read)
    calls = from_json_text(text, f"{where}: a function call")
    listed = calls if isinstance(calls, list) else [calls]
    tool_calls = tuple(parse_tool_call(where, call) for call in listed)
    return Message("assistant", "", None, tool_calls, mark=mark, not_read=not_read)
