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
    message_list,
    parse_tools,
    seen,
)
from qwlit.data.meaning import LABEL_KEYS, MARK_KEYS, MEANING_KEYS, label_of, marks_row, refuse_other_meaning
from qwlit.data.rows import Document, RowError, kind_of
from qwlit.data.sharegpt import parse_turns
from qwlit.data.tokenized import EncodedSample, parse_tokenized
from qwlit.data.unread import has_value

Columns = dict[str, Any]


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
        refuse_other_meaning(value, has_answer=name not in WITHOUT_ANSWER)
        if name is None:
            raise RowError(f"unknown shape: {_keys(value)}; expected {', or '.join(map(_wanted, KEYS))}")
        if not _has_keys(value, name):
            looks = f"; this row looks like {found}" if found else ""
            raise RowError(f"data.format={name} needs {_wanted(name)}; the row has {_keys(value)}{looks}")
        if name == "tokenized":
            return parse_tokenized(value, self.vocab_size, self.loss_on)
        return PARSERS[name](value)

    def unread(self, value: Columns | Document) -> list[str]:
        """Return the keys with values that reading the row left out; the row must be one that can be read."""
        if isinstance(value, Document):
            return []
        name = recognise_format(value) if self.row_format == "auto" else self.row_format
        read = READ[name or "text"] - ({"response"} if _answer_key(value) == "completion" else set())
        # Of the keys that change the meaning only labels may hold something that is not obeyed: a class, for one.
        has_answer = name not in WITHOUT_ANSWER
        obeyed = MEANING_KEYS - {k for k in LABEL_KEYS if label_of(value.get(k), has_answer=has_answer) is None}
        obeyed |= {key for key in MARK_KEYS if marks_row(value.get(key))}
        return [key for key, cell in value.items() if key not in read and key not in obeyed and has_value(cell)]


def parse_messages(row: Columns) -> Conversation:
    """`messages`: role, content, reasoning_content, tool_calls, weight; `system`, `tools`."""
    return _conversation(row, from_json_text(row["messages"], "'messages'"))


def parse_sharegpt(row: Columns) -> Conversation:
    """`conversations`: from, value (or role, content), weight; `system`, `tools`."""
    turns = from_json_text(row["conversations"], "'conversations'")
    if not isinstance(turns, list) or not turns:
        raise RowError(f"'conversations' must be a list with at least one turn, not {seen(turns)}")
    if all(isinstance(turn, dict) and "role" in turn and "from" not in turn for turn in turns):
        return _conversation(row, turns)
    return _complete(row, parse_turns(turns))


def _conversation(row: Columns, messages: Any) -> Conversation:
    return _complete(row, message_list(messages))


def _complete(row: Columns, messages: list[Message]) -> Conversation:
    """Put the row's own system text before the messages, and its tools beside them."""
    system = row.get("system")
    if not isinstance(system, str | None):
        raise RowError(f"'system' must be a string, not {kind_of(system)}")
    if system and messages[0].role != "system":
        messages = [Message("system", system), *messages]
    elif system and messages[0].content.strip() != system.strip():
        raise RowError("has a system column and a system turn that differ; keep one")
    tools, functions = parse_tools(row.get("tools")), parse_tools(row.get("functions"))
    if tools and functions:
        raise RowError("has both 'tools' and 'functions'; keep one")
    return conversation_of(messages, tools or [{"type": "function", "function": function} for function in functions])


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
    return _complete(row, turns)


def _text(row: Columns, key: str) -> str:
    text = row.get(key)
    if text is None and key == "input":
        return ""
    if not isinstance(text, str):
        raise RowError(f"'{key}' must be a string, not {kind_of(text)}")
    return text


def parse_prompt_completion(row: Columns) -> Conversation:
    """`prompt` with `completion` or `response`: two texts, or two lists of messages; `system`, `tools`."""
    return _conversation(row, _messages(row, "prompt", "user") + _messages(row, _answer_key(row), "assistant"))


def _answer_key(row: Columns) -> str:
    return "completion" if row.get("completion") is not None else "response"


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


KEYS: dict[str, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",),),
    "sharegpt": (("conversations",),),
    "tokenized": (("input_ids",),),
    "alpaca": (("instruction",), ("output",)),
    "prompt_completion": (("prompt",), ("completion", "response")),
    "text": (("text",),),
}
"""What a row of each format has: of every group at least one key. A row with the keys of several is the first."""

WITHOUT_ANSWER = ("text", "tokenized")
_BESIDE = {"system", "tools", "functions"}
READ: dict[str, set[str]] = {
    "messages": {"messages", *_BESIDE},
    "sharegpt": {"conversations", *_BESIDE},
    "tokenized": {"input_ids", "labels", "loss_mask"},
    "alpaca": {"instruction", "input", "output", "history", *_BESIDE},
    "prompt_completion": {"prompt", "completion", "response", *_BESIDE},
    "text": {"text"},
}
"""What is read of a row of each format."""

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
