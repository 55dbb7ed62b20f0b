"""A row as the reader returns it, before its format is known, and the form of a quarantined row."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any, NoReturn

from qwlit.core.errors import DataError, one_line

# A longer row usually comes from a broken file; a real conversation of this size would be too long to train on.
MAX_ROW_BYTES = 8 * 2**20
MAX_OBJECTS = 100_000
"""Objects and lists of a row. Python needs 50 to 250 bytes for each, also for the two characters `{}`."""
MAX_REASON = 300
BOM = b"\xef\xbb\xbf"


class RowError(ValueError):
    """A row cannot be used; the quarantine file records the message as the reason."""


class NeedsTokenizer(DataError):
    """A row has text, but there is no tokenizer to encode it."""


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text in which every token is supervised; a long file becomes several blocks."""

    text: str
    is_first: bool = True
    is_last: bool = True

    @property
    def is_whole(self) -> bool:
        return self.is_first and self.is_last


@dataclass(frozen=True, slots=True)
class QuarantinedRow:
    """A quarantined row."""

    source: int
    line: int
    reason: str
    sha256: str
    """Of the raw bytes (for a table: of the row as JSON), to find the row again after lines have moved."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row, not parsed yet."""

    source: int
    """Index of its file in the list of sources."""
    line: int
    """Line, counted from 1; in a JSON array or table the element's number, in a text file the block's first line."""
    content: bytes | dict[str, Any] | Document
    """JSON text, a row of a table by column name, or plain text."""
    unread_columns: tuple[str, ...] = ()
    """Columns of the table that the reader did not load, because no format uses them."""

    def quarantined(self, reason: str) -> QuarantinedRow:
        return QuarantinedRow(
            self.source, self.line, one_line(reason, MAX_REASON), hashlib.sha256(self._raw()).hexdigest()
        )

    def value(self) -> dict[str, Any] | Document:
        """Return the JSON object, the columns or the text.

        Raises:
            RowError: it is not a JSON object.
        """
        return parse_json_object(self.content) if isinstance(self.content, bytes) else self.content

    def num_bytes(self) -> int:
        """Return the approximate size in bytes."""
        if isinstance(self.content, dict):
            return _size(self.content)
        return len(self.content if isinstance(self.content, bytes) else self.content.text)

    def _raw(self) -> bytes:
        if isinstance(self.content, bytes):
            return self.content
        if isinstance(self.content, Document):
            return self.content.text.encode("utf-8", "surrogatepass")
        return json.dumps(self.content, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")


def _size(value: object) -> int:
    """Return the approximate size of the value as JSON, in bytes."""
    if isinstance(value, str | bytes):
        return len(value)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 8 + sum(map(_size, items))


def _no_constant(name: str) -> NoReturn:
    raise RowError(f"not valid JSON: {name} is not a JSON value")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise RowError(f"the number {text[:30]} is too large")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise RowError(f"the key {twice[:30]!r} appears twice in one object")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite)


def parse_json(text: str) -> Any:
    """Parse a JSON text.

    Raises:
        RowError: it is not valid JSON, or has NaN, a key twice or half of a surrogate pair.
    """
    try:
        refuse_many_objects(text)
        value = _DECODER.decode(text)
        # Only an escape such as \ud800 can make half of a surrogate pair: without \u skip this slow check.
        if "\\u" in text:
            refuse_lone_surrogates(json.dumps(value, ensure_ascii=False))
    except RowError:
        raise
    except json.JSONDecodeError as error:
        raise RowError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise RowError(f"not readable as JSON: {str(error)[:100]}") from None
    return value


def refuse_many_objects(text: str) -> None:
    """Raise RowError if a JSON text has too many objects and lists to build: 8 MiB of lists in lists take 400 MB."""
    # Most texts have fewer brackets.
    if text.count("{") + text.count("[") > MAX_OBJECTS:
        outside_of_strings = text.replace("\\\\", "").replace('\\"', "").split('"')[::2]
        number = sum(part.count("{") + part.count("[") for part in outside_of_strings)
        if number > MAX_OBJECTS:
            raise RowError(f"has {number:,} objects and lists; a row may have {MAX_OBJECTS:,}")


def refuse_lone_surrogates(text: str) -> None:
    """Raise RowError if the text cannot be encoded as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError("has half of a surrogate pair (\\ud800 to \\udfff), which is not a character") from None


def parse_json_object(raw: bytes) -> dict[str, Any]:
    """Parse a row that must be one JSON object, or raise RowError."""
    try:
        value = parse_json(raw.removeprefix(BOM).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError(f"not valid UTF-8 at byte {error.start + 1}") from None
    if not isinstance(value, dict):
        raise RowError(f"a row must be a JSON object, not {kind_of(value)}")
    return value


def too_long(size: int) -> str:
    return f"{size:,} bytes long; a row may have {MAX_ROW_BYTES:,}"


def kind_of(value: object) -> str:
    """Return the type of a JSON value in words, for an error message."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
        type(None): "null",
        bytes: "bytes",
    }
    return names.get(type(value), "a number")
