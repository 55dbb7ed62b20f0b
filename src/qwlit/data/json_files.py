"""Read the rows of JSON files: one object per line, an array, or one object over many lines."""

import json
import re
from collections.abc import Iterator
from typing import BinaryIO

from qwlit.core.errors import DataError
from qwlit.data.files import File
from qwlit.data.json_array import PIECE_BYTES, read_array
from qwlit.data.lines import MAX_BLANK_LINES, RowPieces, blank_lines, numbered_lines
from qwlit.data.rows import BOM, MAX_ROW_BYTES, QuarantinedRow, Row, refuse_many_objects

SPACES = b" \t\r\n" + BOM


def read_json_lines(source_index: int, file: File, handle: BinaryIO) -> Iterator[Row | QuarantinedRow]:
    """Read one object per line, or an array, which some data sets also save as .jsonl."""
    is_array = _is_array(_first_line(file, handle), handle)
    handle.seek(0)
    yield from read_array(source_index, handle) if is_array else _read_lines(source_index, file, handle)


def _first_line(file: File, handle: BinaryIO) -> bytes:
    """Return the first line that is not blank, without spaces around it, at most MAX_ROW_BYTES long."""
    for _ in range(MAX_BLANK_LINES + 1):
        line = handle.readline(MAX_ROW_BYTES)
        if not line or line.strip(SPACES):
            return line.strip(SPACES)
    raise blank_lines(file, 1)


def _is_array(first_line: bytes, handle: BinaryIO) -> bool:
    """Return whether the file is one array. If each line is a list, each is a bad row instead.

    Args:
        handle: positioned after the first line.
    """
    if not re.match(rb"\[\s*(\{|\]|$)", first_line):
        return False
    try:
        text = first_line.decode("utf-8")
        refuse_many_objects(text)
        json.loads(text)
    except (ValueError, RecursionError):
        return True  # the array continues on the next line, or is too large for a row
    return not any(piece.strip() for piece in iter(lambda: handle.read(PIECE_BYTES), b""))


def _read_lines(source_index: int, file: File, handle: BinaryIO) -> Iterator[Row | QuarantinedRow]:
    for number, line in numbered_lines(file, handle):
        yield line.row(source_index, number) if isinstance(line, RowPieces) else Row(source_index, number, line)


def read_json(source_index: int, file: File, handle: BinaryIO) -> Iterator[Row | QuarantinedRow]:
    """Read an array, one object per line, or one object over many lines."""
    first_line = _first_line(file, handle)
    handle.seek(0)
    if first_line.startswith(b"["):
        yield from read_array(source_index, handle)
    elif len(first_line) < MAX_ROW_BYTES // 2 and _opens_an_object(first_line):
        content = handle.read(MAX_ROW_BYTES + 1)
        if len(content) > MAX_ROW_BYTES:
            raise DataError(
                f"data file '{file}' is one JSON object of over {MAX_ROW_BYTES:,} bytes; write one object per line"
            )
        yield Row(source_index, 1, content)
    else:
        yield from _read_lines(source_index, file, handle)


def _opens_an_object(first_line: bytes) -> bool:
    """Return whether the line begins an object that continues on the next line: `{`, or `{"messages": [`."""
    text = first_line.decode("utf-8", "replace")
    if not text.startswith("{"):
        return False
    try:
        refuse_many_objects(text)
        json.loads(text)
    except json.JSONDecodeError as error:
        # An error at the end of the line means that the object is only incomplete.
        return error.pos >= len(text)
    except (ValueError, RecursionError):
        pass
    return False
