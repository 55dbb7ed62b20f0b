"""Training rows from files: every line becomes either a parsed JSON object or a reason why not, never a traceback."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from qwlit.core.errors import DataError, nearest
from qwlit.core.files import resolve_path
from qwlit.data.rows import RowError, kind_of

SUFFIXES = (".jsonl", ".json")
# A longer line is a broken file far more often than a conversation, and would be too long to train on in any case.
MAX_ROW_BYTES = 8 * 2**20
BOM = b"\xef\xbb\xbf"
SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class Reject:
    """A row put aside."""

    file: Path
    line: int
    reason: str
    sha256: str
    """Of the row's raw bytes, to find it again after lines have moved."""


@dataclass(frozen=True)
class Row:
    """A row that is a JSON object, its meaning not yet looked at."""

    file: Path
    line: int
    """Counted from 1; in a JSON array the element's number."""
    raw: bytes
    value: dict[str, Any]

    def reject(self, reason: str) -> Reject:
        return Reject(self.file, self.line, reason, hashlib.sha256(self.raw).hexdigest())


def find_files(path: str) -> list[Path]:
    """Return the data files that `path` names: itself, or a folder's .jsonl and .json files in sorted order.

    Raises:
        DataError: nothing is there, or nothing of a known kind.
    """
    root = resolve_path(path)
    try:
        if root.is_dir():
            files = sorted(child for child in root.iterdir() if child.suffix in SUFFIXES and child.is_file())
            if not files:
                raise DataError(f"data folder '{path}' holds no {' or '.join(SUFFIXES)} file")
            return files
        if not root.is_file():
            names = [child.name for child in root.parent.iterdir()] if root.parent.is_dir() else []
            raise DataError(f"data.path or data.val_path: '{path}' does not exist.{nearest(root.name, names)}")
    except OSError as error:
        raise DataError(f"data.path or data.val_path: '{path}' cannot be read: {error.strerror}") from error
    if root.suffix not in SUFFIXES:
        raise DataError(f"data file '{path}' must end in {' or '.join(SUFFIXES)}")
    return [root]


def read_rows(files: Sequence[Path]) -> Iterator[Row | Reject]:
    """Yield every row of every file in order; empty lines are no rows.

    Raises:
        DataError: a file cannot be read, or has no rows at all.
    """
    for file in files:
        empty = True
        try:
            with file.open("rb") as handle:
                is_array = file.suffix == ".json" and handle.read(4096).removeprefix(BOM).lstrip().startswith(b"[")
                handle.seek(0)
                for row in (_read_array if is_array else _read_lines)(file, handle):
                    empty = False
                    yield row
        except OSError as error:
            raise DataError(f"data file '{file}' cannot be read: {error.strerror}") from error
        if empty:
            raise DataError(f"data file '{file}' has no rows; one JSON object a line is expected")


def _read_lines(file: Path, handle: BinaryIO) -> Iterator[Row | Reject]:
    for line in count(1):
        raw = handle.readline(MAX_ROW_BYTES + 1)
        if not raw:
            return
        if len(raw) > MAX_ROW_BYTES:
            yield _skip_long_line(file, line, raw, handle)
        elif raw.removeprefix(BOM).strip():
            yield _parse(file, line, raw)


def _skip_long_line(file: Path, line: int, head: bytes, handle: BinaryIO) -> Reject:
    """Read to the line's end in pieces, so that no line can fill the memory."""
    digest, size, piece = hashlib.sha256(head), len(head), head
    while piece and not piece.endswith(b"\n"):
        piece = handle.readline(MAX_ROW_BYTES)
        digest.update(piece)
        size += len(piece)
    return Reject(file, line, _too_long(size), digest.hexdigest())


def _too_long(size: int) -> str:
    return f"{size:,} bytes long; a row may have {MAX_ROW_BYTES:,}"


def _read_array(file: Path, handle: BinaryIO) -> Iterator[Row | Reject]:
    # Bytes that are not UTF-8 survive the round trip, so that only the element that holds them is rejected.
    text = handle.read().removeprefix(BOM).decode("utf-8", "surrogateescape")
    for index, (element, broken) in enumerate(_array_elements(text), start=1):
        raw = element.encode("utf-8", "surrogateescape")
        reason = broken or (_too_long(len(raw)) if len(raw) > MAX_ROW_BYTES else None)
        yield Row(file, index, raw, {}).reject(reason) if reason else _parse(file, index, raw)


def _array_elements(text: str) -> Iterator[tuple[str, str | None]]:
    """Yield the raw text of each element, and where the array breaks off its rest with the reason."""
    decoder = json.JSONDecoder()
    position = _after_space(text, _after_space(text, 0) + 1)
    while text[position : position + 1] != "]":
        try:
            _, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            yield text[position:], f"the JSON array breaks off here: {getattr(error, 'msg', 'not readable')}"
            return
        yield text[position:end], None
        position = _after_space(text, end)
        if text[position : position + 1] not in {",", "]"}:
            yield text[position:], "the JSON array breaks off here: ',' or ']' expected"
            return
        if text[position] == ",":
            position = _after_space(text, position + 1)
    if rest := text[position + 1 :].strip():
        yield rest, "text after the JSON array"


def _after_space(text: str, position: int) -> int:
    match = SPACE.match(text, position)
    return match.end() if match else position


def _refuse_constant(name: str) -> NoReturn:
    raise RowError(f"not valid JSON: {name} is no JSON value")


def _parse(file: Path, line: int, raw: bytes) -> Row | Reject:
    try:
        value = json.loads(raw.removeprefix(BOM).decode("utf-8"), parse_constant=_refuse_constant)
        if not isinstance(value, dict):
            raise RowError(f"a row must be a JSON object, not {kind_of(value)}")
        if b"\\u" in raw:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return Row(file, line, raw, value)
    except RowError as error:
        reason = str(error)
    except UnicodeDecodeError as error:
        reason = f"not valid UTF-8 at byte {error.start + 1}"
    except UnicodeEncodeError:
        reason = "holds half of a surrogate pair (\\ud800 to \\udfff), which is no character"
    except json.JSONDecodeError as error:
        reason = f"not valid JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:
        reason = f"not readable as JSON: {str(error)[:100]}"
    return Row(file, line, raw, {}).reject(reason)
