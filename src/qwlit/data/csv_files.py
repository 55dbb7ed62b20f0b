"""Read the rows of CSV files as dictionaries by column name."""

import csv
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import BinaryIO

from qwlit.core.errors import DataError
from qwlit.data.files import File
from qwlit.data.lines import MAX_BLANK_LINES, RowPieces, blank_lines, read_line
from qwlit.data.rows import BOM, MAX_ROW_BYTES, QuarantinedRow, Row, too_long

# A quoted cell may contain line breaks. In a longer row, the closing quote is missing.
MAX_CSV_ROW_BYTES = 2**20
MAX_COLUMNS = 10_000
# Lines that are parsed as part of a broken row are parsed again. A file in which most rows are broken in this way
# would take hours.
MAX_BYTES_AGAIN = 32 * MAX_CSV_ROW_BYTES


def read_csv(source_index: int, file: File, handle: BinaryIO) -> Iterator[Row | QuarantinedRow]:
    """Read a CSV file whose first row names the columns. A broken row does not affect the other rows.

    Raises:
        DataError: the first row does not name columns, or most rows are broken.
    """
    rows = _CsvRows(file, handle)
    first = next(rows, None)
    if first is None:
        return
    header = _header(file, first)
    for row in rows:
        broken = row.broken
        if not broken and len(row.cells) != len(header):
            broken = f"{len(row.cells)} cells, but the first row names {len(header)} columns"
        if broken:
            yield row.pieces().quarantined(source_index, row.line, broken)
        else:
            yield Row(source_index, row.line, dict(zip(header, row.cells, strict=True)))


@dataclass(frozen=True, slots=True)
class _CsvRow:
    """A row of a CSV file."""

    line: int
    lines: list[bytes | RowPieces]
    cells: list[str]
    broken: str | None

    def pieces(self) -> RowPieces:
        """Return the bytes of the row."""
        whole = RowPieces()
        for line in self.lines:
            if isinstance(line, RowPieces):
                return line  # a row with a line that is too long has no other line
            whole.add(line)
        return whole


def _header(file: File, first: _CsvRow) -> list[str]:
    """Return the names of the columns."""
    where = f"data file '{file}'"
    if first.broken:
        raise DataError(f"{where}: the first row must name the columns, but it is {first.broken}; save it in UTF-8")
    if len(first.cells) > MAX_COLUMNS:
        raise DataError(f"{where}: the first row names {len(first.cells):,} columns; a table may have {MAX_COLUMNS:,}")
    # pandas writes its index as a column without a name.
    header = [name.strip() or f"column {position}" for position, name in enumerate(first.cells, start=1)]
    if len(set(header)) < len(header):
        raw = first.pieces().content()[:80]
        raise DataError(f"{where}: the first row must name the columns, each once, but it is {raw!r}")
    if len(header) == 1 and (separator := next((s for s in (";", "\t", "，") if s in header[0]), None)):
        raise DataError(f"{where}: its columns are separated by {separator!r}; save it with commas")
    return header


class _CsvRows:
    """Iterates over the rows of a CSV file. After a broken row, it continues with the next line."""

    def __init__(self, file: File, handle: BinaryIO) -> None:
        self._file, self._handle = file, handle
        self._ahead: deque[bytes | RowPieces] = deque()
        """Lines that are read but not used yet: a broken row uses only its first line, the others are parsed again."""
        self._line = 1
        self._bytes_again = 0

    def __iter__(self) -> Iterator[_CsvRow]:
        return self

    def __next__(self) -> _CsvRow:
        last = self._line - 1
        while first := self._ahead[0] if self._ahead else self._read_ahead():
            if self._line == 1 and isinstance(first, bytes):
                self._ahead[0] = first = first.removeprefix(BOM)
            if isinstance(first, RowPieces) or first.strip():
                cells, num_lines, broken = self._parse(first)
                lines = [self._ahead.popleft() for _ in range(num_lines)]
                self._line += num_lines
                return _CsvRow(self._line - num_lines, lines, cells, broken)
            self._ahead.popleft()
            if self._line - last > MAX_BLANK_LINES:
                raise blank_lines(self._file, last + 1)
            self._line += 1
        raise StopIteration

    def _read_ahead(self) -> bytes | RowPieces:
        line = read_line(self._handle)
        if line:
            self._ahead.append(line)
        return line

    def _parse(self, first: bytes | RowPieces) -> tuple[list[str], int, str | None]:
        """Parse the row that begins with the first line ahead; read further lines if a quoted cell continues there.

        Returns:
            The cells, the number of lines that the row has, and the error.
        """
        if isinstance(first, RowPieces):
            return [], 1, too_long(first.size)
        csv.field_size_limit(MAX_ROW_BYTES)
        reader = csv.reader(self._lines(), strict=True)
        try:
            return next(reader), reader.line_num, None
        except UnicodeDecodeError as error:
            reason = f"not valid UTF-8 at byte {error.start + 1}"
        except (csv.Error, StopIteration) as error:
            reason = f"not valid CSV: {str(error) or 'a quote is never closed'}"
        self._count_again(reader.line_num)
        return [], 1, reason

    def _lines(self) -> Iterator[str]:
        """Yield the lines of a row."""
        size = 0
        for position in count():
            if position == len(self._ahead) and (size > MAX_CSV_ROW_BYTES or not self._read_ahead()):
                return
            line = self._ahead[position]
            if isinstance(line, RowPieces):
                return
            size += len(line)
            yield line.decode("utf-8")

    def _count_again(self, num_lines: int) -> None:
        """Count the lines after the first of a broken row, which are parsed again."""
        self._bytes_again += sum(len(line) for line in islice(self._ahead, 1, num_lines) if isinstance(line, bytes))
        if self._bytes_again > MAX_BYTES_AGAIN:
            raise DataError(
                f"data file '{self._file}': too many rows to line {self._line} have a quote that is never closed;"
                " write the file again with a library for CSV, or as JSON lines"
            )
