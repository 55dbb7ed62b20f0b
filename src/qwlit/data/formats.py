"""Row formats: recognise a row by its keys and parse it into a conversation, a document or a tokenized sample."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qwlit.data.config import LossOn, RowFormat
from qwlit.data.conversation import (
    Conversation,
    Message,
    conversation_of,
    from_json_text,
    kind_or_empty,
    message_list,
    parse_tools,
)
from qwlit.data.row_labels import (
    LABEL_KEYS,
    MARK_KEYS,
    REFUSABLE_KEYS,
    as_flag,
    label_value,
    refuse_marked_row,
    refuse_unsupported_row,
)
from qwlit.data.rows import Document, RowError, kind_of
from qwlit.data.sharegpt import parse_turns
from qwlit.data.tokenized import EncodedSample, parse_tokenized
from qwlit.data.unread import unread_keys

Columns = dict[str, Any]


@dataclass(frozen=True)
class RowParser:
    """Parses rows of one format, or with `auto` of the format that each row has."""

    row_format: RowFormat
    vocab_size: int
    """Token ids of tokenized rows must be below it."""
    loss_on: LossOn

    def __call__(self, value: Columns | Document) -> Conversation | Document | EncodedSample:
        """Parse a row.

        Raises:
            RowError: the row has no known format, not the format that `row_format` requires, or wrong content.
        """
        if isinstance(value, Document):
            value = {"text": value}
        recognised = recognise_format(value)
        name = recognised if self.row_format == "auto" else self.row_format
        refuse_marked_row(value)
        refuse_unsupported_row(value, has_answer=name not in FORMATS_WITHOUT_ANSWER)
        if name is None:
            expected = ", or ".join(map(_name_required_keys, REQUIRED_KEYS))
            raise RowError(f"unknown format: {_name_keys(value)}{_columns_hint(value)}; expected {expected}")
        if not _has_keys(value, name):
            hint = f"; this row looks like {recognised}" if recognised else ""
            needed = _name_required_keys(name)
            raise RowError(f"data.format={name} needs {needed}; the row has {_name_keys(value)}{hint}")
        if name == "tokenized":
            return parse_tokenized(value, self.vocab_size, self.loss_on)
        return PARSERS[name](value)

    def unread_keys(self, value: Columns | Document) -> list[str]:
        """Return the keys with a value that the parser does not use. The row must be one that it can parse."""
        if isinstance(value, Document):
            return []
        name = recognise_format(value) if self.row_format == "auto" else self.row_format
        read = READ_KEYS[name or "text"] - ({"response"} if _answer_key(value) == "completion" else set())
        # If `label` is the number of a class, the parser ignores it, and it counts as unread.
        has_answer = name not in FORMATS_WITHOUT_ANSWER
        obeyed = REFUSABLE_KEYS - {k for k in LABEL_KEYS if label_value(value.get(k), has_answer=has_answer) is None}
        obeyed |= {key for key in MARK_KEYS if as_flag(value.get(key))}
        return unread_keys(value, read | obeyed)


def parse_messages(row: Columns) -> Conversation:
    """Parse `messages`: role, content, reasoning_content, tool_calls, weight; `system`, `tools`."""
    return _conversation(row, from_json_text(row["messages"], "'messages'"))


def parse_sharegpt(row: Columns) -> Conversation:
    """Parse `conversations`: from, value (or role, content), weight; `system`, `tools`."""
    turns = from_json_text(row["conversations"], "'conversations'")
    if not isinstance(turns, list) or not turns:
        raise RowError(f"'conversations' must be a list with at least one turn, not {kind_or_empty(turns)}")
    if all(isinstance(turn, dict) and "role" in turn and "from" not in turn for turn in turns):
        return _conversation(row, turns)
    return _with_system_and_tools(row, parse_turns(turns))


def _conversation(row: Columns, messages: Any) -> Conversation:
    return _with_system_and_tools(row, message_list(messages))


def _with_system_and_tools(row: Columns, messages: list[Message]) -> Conversation:
    """Build the conversation, with the system text and the tools from the row's own columns."""
    system = row.get("system")
    if not isinstance(system, str | None):
        raise RowError(f"'system' must be a string, not {kind_of(system)}")
    if system and messages[0].role != "system":
        messages = [Message("system", system), *messages]
    elif system and messages[0].content.strip() != system.strip():
        raise RowError("has a 'system' column and a system turn that differ; keep one")
    tools, functions = parse_tools(row.get("tools")), parse_tools(row.get("functions"))
    if tools and functions:
        raise RowError("has both 'tools' and 'functions'; keep one")
    return conversation_of(messages, tools or [{"type": "function", "function": function} for function in functions])


def parse_alpaca(row: Columns) -> Conversation:
    """Parse `instruction`, `input`, `output`; `history` (pairs of question and answer), `system`, `tools`."""
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
    return _with_system_and_tools(row, turns)


def _text(row: Columns, key: str) -> str:
    text = row.get(key)
    if text is None and key == "input":
        return ""
    if not isinstance(text, str):
        raise RowError(f"'{key}' must be a string, not {kind_of(text)}")
    return text


def parse_prompt_completion(row: Columns) -> Conversation:
    """Parse `prompt` with `completion` or `response`: two texts, or two lists of messages; `system`, `tools`."""
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
    """Parse `text`: a document."""
    text = row["text"]
    if isinstance(text, Document):
        return text
    if not isinstance(text, str):
        raise RowError(f"'text' must be a string, not {kind_of(text)}")
    if not text.strip():
        raise RowError("the text is empty")
    return Document(text)


REQUIRED_KEYS: dict[str, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",),),
    "sharegpt": (("conversations",),),
    "tokenized": (("input_ids",),),
    "alpaca": (("instruction",), ("output",)),
    "prompt_completion": (("prompt",), ("completion", "response")),
    "text": (("text",),),
}
"""Required keys of each format: at least one key of every group. If a row fits several formats, the first one wins."""

FORMATS_WITHOUT_ANSWER = ("text", "tokenized")
_CONVERSATION_KEYS = {"system", "tools", "functions"}
READ_KEYS: dict[str, set[str]] = {
    "messages": {"messages", *_CONVERSATION_KEYS},
    "sharegpt": {"conversations", *_CONVERSATION_KEYS},
    "tokenized": {"input_ids", "labels", "loss_mask"},
    "alpaca": {"instruction", "input", "output", "history", *_CONVERSATION_KEYS},
    "prompt_completion": {"prompt", "completion", "response", *_CONVERSATION_KEYS},
    "text": {"text"},
}
"""All keys that the parser of each format reads."""

PARSERS: dict[str, Callable[[Columns], Conversation | Document]] = {
    "messages": parse_messages,
    "sharegpt": parse_sharegpt,
    "alpaca": parse_alpaca,
    "prompt_completion": parse_prompt_completion,
    "text": parse_text,
}


def recognise_format(row: Columns) -> str | None:
    """Return the first format whose required keys have a value; if there is none, the first whose keys exist at all."""
    with_values = {key: value for key, value in row.items() if value is not None}
    return next(
        (name for candidate in (with_values, row) for name in REQUIRED_KEYS if _has_keys(candidate, name)), None
    )


def _has_keys(row: Columns, name: str) -> bool:
    return all(any(key in row for key in group) for group in REQUIRED_KEYS[name])


def _columns_hint(row: Columns) -> str:
    """Return how `data.columns` would read a row of two texts as question and answer; "" for another row."""
    if {"instruction", "input"} <= row.keys():  # both are the question
        return '; the answer is in "output", or name its column: "data.columns={output: COLUMN}"'
    texts = [key for key, value in row.items() if isinstance(value, str) and value.strip()]
    has_answer = "completion" in texts or "response" in texts
    missing = [key for key in ("prompt", "completion") if key not in texts and not (key == "completion" and has_answer)]
    unread = [key for key in texts if key not in READ_KEYS["prompt_completion"]]
    if len(unread) < len(missing):
        return ""
    pairs = zip(missing, unread, strict=False)
    columns = ", ".join(f"{key}: {column if column.isidentifier() else repr(column)}" for key, column in pairs)
    return f'; for a question and its answer set "data.columns={{{columns}}}"'


def _name_required_keys(name: str) -> str:
    return " and ".join(" or ".join(f"'{key}'" for key in group) for group in REQUIRED_KEYS[name])


def _name_keys(row: Columns) -> str:
    return "keys " + (", ".join(repr(str(key)[:30]) for key in list(row)[:8]) or "none")
