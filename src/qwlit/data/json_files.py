"""Read the rows of JSON files: one object per line, an array, or one object over many lines."""

import hashlib
import json
import re
from collections.abc import Iterator
from itertools import count
from typing import BinaryIO

from qwlit.core.errors import DataError
from qwlit.data.files import File
from qwlit.data.rows import BOM, MAX_ROW_BYTES, QuarantinedRow, Row, too_long

SPACE = re.compile(r"\s*")
SPACES = b" \t\r\n" + BOM


def read_json_lines(source_index: int, file: File, handle: BinaryIO) -> Iterator[Row | QuarantinedRow]:
    """Read one object per line, or an array, which some data sets also save as .jsonl."""
    is_array = _is_array(_first_line(handle), handle)
    handle.seek(0)
    yield from _read_array(source_index, handle) if is_array else _read_lines(source_index, handle)


def _first_line(handle: BinaryIO) -> bytes:
    """Return the first line that is not blank, without spaces around it, at most MAX_ROW_BYTES long."""
    lines = iter(lambda: handle.readline(MAX_ROW_BYTES), b"")
    return next((line for line in lines if line.strip(SPACES)), b"").strip(SPACES)


def _is_array(first_line: bytes, handle: BinaryIO) -> bool:
    """Return whether the file is one array. If each line is a list, each is a bad row instead.

    Args:
        handle: positioned after the first line.
    """
    if not re.match(rb"\[\s*(\{|\]|$)", first_line):
        return False
    try:
        json.loads(first_line)
    except (ValueError, RecursionError):
        return True  # the array continues on the next line
    return not any(line.strip() for line in iter(lambda: handle.readline(MAX_ROW_BYTES), b""))


def _read_lines(source_index: int, handle: BinaryIO) -> Iterator[Row | QuarantinedRow]:
    for line in count(1):
        raw = handle.readline(MAX_ROW_BYTES + 1)
        if not raw:
            return
        if len(raw) > MAX_ROW_BYTES:
            yield _skip_long_line(source_index, line, raw, handle)
        elif raw.removeprefix(BOM).strip():
            yield Row(source_index, line, raw)


def _skip_long_line(source_index: int, line: int, head: bytes, handle: BinaryIO) -> QuarantinedRow:
    """Read to the end of the line in pieces: a line of any length needs little memory."""
    digest, size, piece = hashlib.sha256(head), len(head), head
    while piece and not piece.endswith(b"\n"):
        piece = handle.readline(MAX_ROW_BYTES)
        digest.update(piece)
        size += len(piece)
    return QuarantinedRow(source_index, line, too_long(size), digest.hexdigest())


def read_json(source_index: int, file: File, handle: BinaryIO) -> Iterator[Row | QuarantinedRow]:
    """Read an array, one object per line, or one object over many lines."""
    first_line = _first_line(handle)
    handle.seek(0)
    if first_line.startswith(b"["):
        yield from _read_array(source_index, handle)
    elif len(first_line) < MAX_ROW_BYTES // 2 and _opens_an_object(first_line):
        content = handle.read(MAX_ROW_BYTES + 1)
        if len(content) > MAX_ROW_BYTES:
            raise DataError(
                f"data file '{file}' is one JSON object of over {MAX_ROW_BYTES:,} bytes; write one object per line"
            )
        yield Row(source_index, 1, content)
    else:
        yield from _read_lines(source_index, handle)


def _opens_an_object(first_line: bytes) -> bool:
    """Return whether the line begins an object that continues on the next line: `{`, or `{"messages": [`."""
    text = first_line.decode("utf-8", "replace")
    if not text.startswith("{"):
        return False
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        # An error at the end of the line means that the object is only incomplete.
        return error.pos >= len(text)
    except (ValueError, RecursionError):
        pass
    return False


def _read_array(source_index: int, handle: BinaryIO) -> Iterator[Row | QuarantinedRow]:
    # surrogateescape keeps bytes that are not UTF-8, so only the element with such bytes is rejected, not the file.
    text = handle.read().removeprefix(BOM).decode("utf-8", "surrogateescape")
    for index, (element, broken) in enumerate(_array_elements(text), start=1):
        row = Row(source_index, index, element.encode("utf-8", "surrogateescape"))
        yield row.quarantined(broken) if broken else row.within_limit()


def _array_elements(text: str) -> Iterator[tuple[str, str | None]]:
    """Yield (raw text, None) for each element; if the array is not valid, (rest of the text, reason) at the end."""
    # Here we need only the end of each element. `len` avoids converting numbers: Python refuses very long integers.
    decoder = json.JSONDecoder(parse_int=len, parse_float=len)
    position = _after_space(text, _after_space(text, 0) + 1)
    while text[position : position + 1] != "]":
        try:
            _, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            yield text[position:], f"the JSON array is not valid from here on: {getattr(error, 'msg', 'not readable')}"
            return
        yield text[position:end], None
        position = _after_space(text, end)
        if text[position : position + 1] not in {",", "]"}:
            yield text[position:], "the JSON array is not valid from here on: ',' or ']' expected"
            return
        if text[position] == ",":
            position = _after_space(text, position + 1)
    if rest := text[position + 1 :].strip():
        yield rest, "text after the JSON array"


def _after_space(text: str, position: int) -> int:
    match = SPACE.match(text, position)
    return match.end() if match else position
