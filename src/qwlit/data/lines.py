"""Read rows piece by piece: of a row that is too long, memory holds one piece, and its hash and size are kept."""

import hashlib
from collections.abc import Iterator
from typing import BinaryIO

from qwlit.core.errors import DataError
from qwlit.data.files import File
from qwlit.data.rows import BOM, MAX_ROW_BYTES, QuarantinedRow, Row, too_long

MAX_BLANK_LINES = 1_000_000
"""Blank lines one after the other; some bytes of a gzip file can be any number of them."""


class RowPieces:
    """The bytes of a row, added piece by piece."""

    def __init__(self) -> None:
        self.size = 0
        """Bytes of all pieces."""
        self._pieces: list[bytes] = []
        self._digest = hashlib.sha256()

    def add(self, piece: bytes) -> None:
        self.size += len(piece)
        self._pieces.append(piece)
        if self.is_too_long:
            for kept in self._pieces:
                self._digest.update(kept)
            self._pieces.clear()

    @property
    def is_too_long(self) -> bool:
        return self.size > MAX_ROW_BYTES

    def content(self) -> bytes:
        """Return the bytes of a row that is not too long."""
        return b"".join(self._pieces)

    def row(self, source_index: int, line: int) -> Row | QuarantinedRow:
        """Return the row; quarantine it if it is too long."""
        if self.is_too_long:
            return self.quarantined(source_index, line, too_long(self.size))
        return Row(source_index, line, self.content())

    def quarantined(self, source_index: int, line: int, reason: str) -> QuarantinedRow:
        if self.is_too_long:
            return QuarantinedRow(source_index, line, reason, self._digest.hexdigest())
        return Row(source_index, line, self.content()).quarantined(reason)


def read_line(handle: BinaryIO) -> bytes | RowPieces:
    """Return the next line; b"" at the end of the file. Of a line that is too long, the file is read to its end."""
    line = handle.readline(MAX_ROW_BYTES + 1)
    if len(line) <= MAX_ROW_BYTES:
        return line
    pieces, piece = RowPieces(), line
    pieces.add(line)
    while piece and not piece.endswith(b"\n"):
        piece = handle.readline(MAX_ROW_BYTES)
        pieces.add(piece)
    return pieces


def numbered_lines(file: File, handle: BinaryIO) -> Iterator[tuple[int, bytes | RowPieces]]:
    """Yield the lines that are not blank, with their numbers from 1.

    Raises:
        DataError: more than MAX_BLANK_LINES blank lines follow one another.
    """
    number = last = 0
    while line := read_line(handle):
        number += 1
        if isinstance(line, RowPieces) or line.removeprefix(BOM).strip():
            last = number
            yield number, line
        elif number - last > MAX_BLANK_LINES:
            raise blank_lines(file, last + 1)


def blank_lines(file: File, line: int) -> DataError:
    return DataError(f"data file '{file}' has more than {MAX_BLANK_LINES:,} blank lines from line {line}; remove them")
