"""The shapes a row may have: told by its keys, read into a conversation, a document or a tokenized sample."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qwlit.data.config import LossOn, RowFormat
from qwlit.data.conversation import (
    Conversation,
    Message,
    conversation_of,
    from_json_text,
    parse_conversation,
    parse_tool_call,
    parse_tools,
)
from qwlit.data.rows import Document, RowError, kind_of

IGNORED_LABEL = -100
Columns = dict[str, Any]


@dataclass(frozen=True)
class EncodedSample:
    """A sample as tokens: two lists of T numbers."""

    input_ids: list[int]
    loss_mask: list[int]
    """1 where the token is learnt; the first token is nobody's target and always 0."""

    def cut(self, start: int, end: int) -> "EncodedSample":
        """Return the tokens from `start` to before `end` as a sample of their own."""
        return EncodedSample(self.input_ids[start:end], [0, *self.loss_mask[start + 1 : end]])

    def split(self, limit: int) -> "list[EncodedSample]":
        """Cut into samples of at most `limit` tokens. Each begins with the last token of the one before, so that
        every token but the very first is somebody's target."""
        starts = range(0, max(1, len(self.input_ids) - 1), limit - 1)
        return [self.cut(start, start + limit) for start in starts]


@dataclass(frozen=True)
class RowParser:
    """Reads rows of one format, or of whichever format each is."""

    row_format: RowFormat
    vocab_size: int
    """Token ids of tokenized rows must lie below it."""
    loss_on: LossOn

    def __call__(self, value: Columns | Document) -> Conversation | Document | EncodedSample:
        """Read a row.

        Raises:
            RowError: it has no known shape, another one than the format set, or something in it is wrong.
        """
        if isinstance(value, Document):
            value = {"text": value}
        found = recognise_format(value)
        name = found if self.row_format == "auto" else self.row_format
        if name is None:
            raise RowError(f"unknown shape: {_keys(value)}; expected {', or '.join(map(_wanted, KEYS))}")
        if not _has_keys(value, name):
            looks = f"; this row looks like {found}" if found else ""
            raise RowError(f"data.format={name} needs {_wanted(name)}; the row has {_keys(value)}{looks}")
        if name == "tokenized":
            return parse_tokenized(value, self.vocab_size, self.loss_on)
        return PARSERS[name](value)


def parse_messages(row: Columns) -> Conversation:
    """`messages`: role, content, reasoning_content, tool_calls, weight; `system`, `tools`."""
    return _conversation(row, from_json_text(row["messages"], "'messages'"))


def _conversation(row: Columns, messages: Any) -> Conversation:
    """Read messages with the row's own system text before them, and its tools."""
    tools = row.get("tools")
    if tools is None and (functions := parse_tools(row.get("functions"))):
        tools = [{"type": "function", "function": function} for function in functions]
    system = _system(row)
    if system and isinstance(messages, list):
        messages = system + messages
    return parse_conversation(messages, tools)


SHAREGPT_ROLES = {
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
    **dict.fromkeys(("observation", "tool", "function_response", "tool_response"), "tool"),
}


def parse_sharegpt(row: Columns) -> Conversation:
    """`conversations`: from, value (or role, content); `system`, `tools`."""
    turns = from_json_text(row["conversations"], "'conversations'")
    if not isinstance(turns, list) or not turns:
        raise RowError(f"'conversations' must be a list with at least one turn, not {kind_of(turns)}")
    if all(isinstance(turn, dict) and "role" in turn and "from" not in turn for turn in turns):
        return _conversation(row, turns)
    messages = [_turn(f"turn {number}", turn) for number, turn in enumerate(turns, start=1)]
    system = [Message("system", part["content"]) for part in _system(row)]
    return conversation_of(system + messages, row.get("tools"))


def _turn(where: str, turn: object) -> Message:
    if not isinstance(turn, dict):
        raise RowError(f"{where} must be an object, not {kind_of(turn)}")
    speaker, text = turn.get("from"), turn.get("value")
    role = SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise RowError(f"{where}: from {str(speaker)[:30]!r} is none of {', '.join(SHAREGPT_ROLES)}")
    if not isinstance(text, str):
        raise RowError(f"{where}: 'value' must be a string, not {kind_of(text)}")
    if role != "call":
        return Message(role, text)
    calls = from_json_text(text, f"{where}: a function call")
    listed = calls if isinstance(calls, list) else [calls]
    return Message("assistant", "", None, tuple(parse_tool_call(where, call) for call in listed))


def _system(row: Columns) -> list[Columns]:
    """Return a row's `system` as a list with one message, or none."""
    system = row.get("system")
    if not isinstance(system, str | None):
        raise RowError(f"'system' must be a string, not {kind_of(system)}")
    return [{"role": "system", "content": system}] if system else []


def parse_alpaca(row: Columns) -> Conversation:
    """`instruction`, `input`, `output`; `history` (pairs of question and answer), `system`, `tools`."""
    texts = {key: _text(row, key) for key in ("instruction", "input", "output")}
    history = from_json_text(row.get("history"), "'history'") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in history
    ):
        raise RowError("'history' must be a list of [question, answer] pairs")
    question = "\n".join(text for text in (texts["instruction"], texts["input"]) if text)
    if not question.strip():
        raise RowError("'instruction' and 'input' are both empty")
    pairs = [*history, [question, texts["output"]]]
    turns = [Message(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]
    system = [Message("system", part["content"]) for part in _system(row)]
    return conversation_of(system + turns, row.get("tools"))


def _text(row: Columns, key: str) -> str:
    text = row.get(key)
    if text is None and key == "input":
        return ""
    if not isinstance(text, str):
        raise RowError(f"'{key}' must be a string, not {kind_of(text)}")
    return text


def parse_prompt_completion(row: Columns) -> Conversation:
    """`prompt` with `completion` or `response`: two texts, or two lists of messages; `system`, `tools`."""
    answer_key = "completion" if row.get("completion") is not None else "response"
    return _conversation(row, _messages(row, "prompt", "user") + _messages(row, answer_key, "assistant"))


def _messages(row: Columns, key: str, role: str) -> list[Any]:
    value = row.get(key)
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list) and value:
        return value
    raise RowError(f"'{key}' must be a text or a list of messages, not {kind_of(value)}")


def parse_text(row: Columns) -> Document:
    """`text`: a document."""
    text = row["text"]
    if isinstance(text, Document):
        return text
    if not isinstance(text, str):
        raise RowError(f"'text' must be a string, not {kind_of(text)}")
    if not text.strip():
        raise RowError("the text is empty")
    return Document(text)


def parse_tokenized(row: Columns, vocab_size: int, loss_on: LossOn) -> EncodedSample:
    """Read `input_ids` with `labels` or `loss_mask`; alone they are learnt whole where `loss_on` is all."""
    ids = from_json_text(row["input_ids"], "'input_ids'")
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise RowError("'input_ids' must be a list of whole numbers")
    if len(ids) < 2:
        raise RowError(f"'input_ids' has {len(ids)} tokens; the first is never learnt, so 2 are the least")
    if min(ids) < 0 or max(ids) >= vocab_size:
        wrong = next(token for token in ids if not 0 <= token < vocab_size)
        raise RowError(f"token id {str(wrong)[:30]} is not within the vocabulary of {vocab_size}")
    labels, mask = (from_json_text(row.get(key), f"'{key}'") for key in ("labels", "loss_mask"))
    if labels is not None and mask is not None:
        raise RowError("has both 'labels' and 'loss_mask'; keep one")
    if labels is not None:
        mask = _mask_of_labels(ids, labels)
    elif mask is None:
        if "labels" in row or "loss_mask" in row or loss_on != "all":
            raise RowError("'input_ids' without 'labels' or 'loss_mask'; data.loss_on=all learns every token")
        mask = [1] * len(ids)
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


KEYS: dict[str, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",),),
    "sharegpt": (("conversations",),),
    "tokenized": (("input_ids",),),
    "alpaca": (("instruction",), ("output",)),
    "prompt_completion": (("prompt",), ("completion", "response")),
    "text": (("text",),),
}
"""What a row of each format has: of every group at least one key. A row with the keys of several is the first."""

OTHER_KEYS = {"labels", "loss_mask", "input", "history", "system", "tools", "functions"}
"""What rows may have besides."""

PARSERS: dict[str, Callable[[Columns], Conversation | Document]] = {
    "messages": parse_messages,
    "sharegpt": parse_sharegpt,
    "alpaca": parse_alpaca,
    "prompt_completion": parse_prompt_completion,
    "text": parse_text,
}


def recognise_format(row: Columns) -> str | None:
    """Return the first format whose keys the row has, with values rather than nulls where there is a choice."""
    filled = {key: value for key, value in row.items() if value is not None}
    return next((name for candidate in (filled, row) for name in KEYS if _has_keys(candidate, name)), None)


def _has_keys(row: Columns, name: str) -> bool:
    return all(any(key in row for key in group) for group in KEYS[name])


def _wanted(name: str) -> str:
    return " and ".join(" or ".join(f"'{key}'" for key in group) for group in KEYS[name])


def _keys(row: Columns) -> str:
    return "keys " + (", ".join(repr(str(key)[:30]) for key in list(row)[:8]) or "none")
