"""Read a JSON array piece by piece."""

import json
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from qwlit.data.lines import RowPieces
from qwlit.data.rows import BOM, QuarantinedRow, Row

PIECE_BYTES = 2**20
SPACES = " \t\r\n"
BLANKS = SPACES.encode()
INVALID = "the JSON array is not valid from here on"
EXPECTED = "',' or ']' expected"
# Here we need only the end of an element. `len` avoids converting numbers: Python refuses very long integers.
DECODER = json.JSONDecoder(parse_int=len, parse_float=len)
QUOTE, COMMA = ord('"'), ord(",")
# By byte: whether it shapes an array, and how many levels deeper the bytes after it are.
_IS_MARK = np.zeros(256, dtype=bool)
_IS_MARK[list(b'"[]{},')] = True
_LEVELS = np.zeros(256, dtype=np.int8)
_LEVELS[list(b"[{")] = 1
_LEVELS[list(b"]}")] = -1


def read_array(source_index: int, handle: BinaryIO) -> Iterator[Row | QuarantinedRow]:
    """Yield the elements, numbered from 1. Where the array is not valid, all that follows is one quarantined row."""
    array = _Array(handle)
    number = 1
    for element, end in array.elements():
        content = element.content()
        if element.is_too_long:
            yield element.row(source_index, number)
            number += 1
        # Without content, the array is empty, or a comma stands behind its last element.
        elif end != b"]" or content.strip(BLANKS):
            length, reason = _value_length(content)
            if length:
                yield Row(source_index, number, content[:length].strip(BLANKS))
                number += 1
            if reason or not end:
                rest = array.rest(content[length:] + end)
                yield rest.quarantined(source_index, number, f"{INVALID}: {reason or EXPECTED}")
                return
        if end == b"]":
            break
    rest = array.rest(b"")
    if rest.is_too_long or rest.content().strip(BLANKS):
        yield rest.quarantined(source_index, number, "text after the JSON array")


def _value_length(content: bytes) -> tuple[int, str | None]:
    """Return the bytes of the JSON value with which `content` begins, and what is wrong with it or behind it."""
    # surrogateescape keeps bytes that are not UTF-8, so only the element with such bytes is rejected, not the file.
    text = content.decode("utf-8", "surrogateescape")
    try:
        _, end = DECODER.raw_decode(text, len(text) - len(text.lstrip(SPACES)))
    except (ValueError, RecursionError) as error:
        return 0, getattr(error, "msg", "not readable")
    if not text[end:].strip(SPACES):
        return len(content), None
    return len(text[:end].encode("utf-8", "surrogateescape")), EXPECTED


class _Array:
    """Divides the text of an array at its commas. It follows quotes and brackets, and checks nothing else."""

    def __init__(self, handle: BinaryIO) -> None:
        """`handle`: at the start of the array, or at spaces before it."""
        self._handle = handle
        self._piece, self._start = b"", 0
        """Bytes that are read, and where those begin that no element has yet."""
        while not self._piece:
            self._piece = handle.read(PIECE_BYTES).lstrip(BLANKS + BOM)
        self._piece = self._piece.removeprefix(b"[")
        self._depth, self._is_quoted = 1, False

    def elements(self) -> Iterator[tuple[RowPieces, bytes]]:
        """Yield each element with the byte behind it: a comma, the end of the array, or nothing at the file's end."""
        element = RowPieces()
        more = b"["
        while more:
            # An escaped backslash, or an escaped quote, ends no string.
            masked = self._piece.replace(b"\\\\", b"..").replace(b'\\"', b"..")
            # The character that a last backslash escapes is in the next piece.
            whole = len(masked) - masked.endswith(b"\\")
            for end in self._ends(masked[:whole]):
                element.add(self._piece[self._start : end])
                self._start = end + 1
                yield element, self._piece[end : end + 1]
                element = RowPieces()
            element.add(self._piece[self._start : whole])
            more = self._handle.read(PIECE_BYTES)
            self._piece, self._start = self._piece[whole:] + more, 0
        element.add(self._piece)
        self._piece = b""
        yield element, b""

    def _ends(self, masked: bytes) -> list[int]:
        """Return where elements end in the piece, and note where the next piece begins: how deep, and in a string."""
        codes = np.frombuffer(masked, np.uint8)
        is_mark = _IS_MARK[codes]
        marks = codes[is_mark]
        if not len(marks):
            return []
        quoted = np.logical_xor.accumulate(np.append(self._is_quoted, marks == QUOTE))[1:]
        depths = np.cumsum(_LEVELS[marks] * ~quoted, dtype=np.int32) + self._depth
        self._is_quoted, self._depth = bool(quoted[-1]), int(depths[-1])
        ends_element = ~quoted & ((marks == COMMA) & (depths == 1) | (depths == 0))
        if not ends_element.any():
            return []  # inside of a long element
        ends: list[int] = np.flatnonzero(is_mark)[ends_element].tolist()
        return ends

    def rest(self, first: bytes) -> RowPieces:
        """Return `first` and all bytes behind the last element."""
        pieces = RowPieces()
        pieces.add(first + self._piece[self._start :])
        while more := self._handle.read(PIECE_BYTES):
            pieces.add(more)
        return pieces
