"""Read the rows of tables, CSV and Parquet, as dictionaries by column name."""

import csv
from collections import deque
from collections.abc import Collection, Iterator
from itertools import count
from typing import Any, BinaryIO

from qwlit.core.errors import DataError
from qwlit.data.files import File
from qwlit.data.formats import READ_KEYS
from qwlit.data.row_labels import MARK_KEYS, REFUSABLE_KEYS
from qwlit.data.rows import BOM, MAX_ROW_BYTES, QuarantinedRow, Row, too_long
from qwlit.data.unread import MAX_NAMED

# A quoted cell may contain line breaks. In a longer row, the closing quote is missing.
MAX_CSV_ROW_BYTES = 2**20
PARQUET_ROWS, PARQUET_BYTES = 1000, 16 * 2**20
# The columns that formats read, and those for which a row may be refused or not supervised.
KNOWN_COLUMNS = REFUSABLE_KEYS.union(MARK_KEYS, *READ_KEYS.values())


def read_csv(source_index: int, file: File, handle: BinaryIO) -> Iterator[Row | QuarantinedRow]:
    """Read a CSV file whose first row names the columns. A broken row does not affect the other rows."""
    rows = _csv_rows(handle)
    first = next(rows, None)
    if first is None:
        return
    _, names, raw, broken = first
    # pandas writes its index as a column without a name.
    header = [name.strip() or f"column {position}" for position, name in enumerate(names, start=1)]
    if broken:
        raise DataError(
            f"data file '{file}': the first row must name the columns, but it is {broken}; save it in UTF-8"
        )
    if len(set(header)) < len(header):
        raise DataError(f"data file '{file}': the first row must name the columns, each once, but it is {raw[:80]!r}")
    if len(header) == 1 and (separator := next((s for s in (";", "\t", "，") if s in header[0]), None)):
        raise DataError(f"data file '{file}': its columns are separated by {separator!r}; save it with commas")
    for line, cells, raw, broken in rows:
        if broken:
            yield Row(source_index, line, raw).quarantined(broken)
        elif len(cells) != len(header):
            counts = f"{len(cells)} cells, but the first row names {len(header)} columns"
            yield Row(source_index, line, raw).quarantined(counts)
        else:
            yield Row(source_index, line, dict(zip(header, cells, strict=True)))


def _csv_rows(handle: BinaryIO) -> Iterator[tuple[int, list[str], bytes, str | None]]:
    """Yield (line, cells, raw bytes, error). After a broken row, continue with the next line."""
    # Lines that are read but not used yet: a broken row uses only its first line, and the others are parsed again.
    ahead: deque[bytes] = deque()
    line = 1
    while ahead or (more := handle.readline()):
        if not ahead:
            ahead.append(more)
        if line == 1:
            ahead[0] = ahead[0].removeprefix(BOM)
        if not ahead[0].strip():
            ahead.popleft()
            line += 1
            continue
        cells, num_lines, reason = _csv_row(ahead, handle)
        raw = b"".join(ahead.popleft() for _ in range(num_lines))
        yield line, cells, raw, reason
        line += num_lines


def _csv_row(ahead: deque[bytes], handle: BinaryIO) -> tuple[list[str], int, str | None]:
    """Parse the row that begins with the first line of `ahead`; append further lines if a quoted cell continues there.

    Returns:
        The cells, the source_index of lines that the row has, and the error.
    """
    if len(ahead[0]) > MAX_ROW_BYTES:
        return [], 1, too_long(len(ahead[0]))
    csv.field_size_limit(MAX_ROW_BYTES)
    reader = csv.reader(_lines(ahead, handle), strict=True)
    try:
        return next(reader), reader.line_num, None
    except UnicodeDecodeError as error:
        return [], 1, f"not valid UTF-8 at byte {error.start + 1}"
    except (csv.Error, StopIteration) as error:
        return [], 1, f"not valid CSV: {str(error) or 'a quote is never closed'}"


def _lines(ahead: deque[bytes], handle: BinaryIO) -> Iterator[str]:
    size = 0
    for position in count():
        if position == len(ahead):
            if size > MAX_CSV_ROW_BYTES or not (more := handle.readline()):
                return
            ahead.append(more)
        size += len(ahead[position])
        yield ahead[position].decode("utf-8")


def read_parquet(
    source_index: int, file: File, handle: BinaryIO, *, wanted: Collection[str]
) -> Iterator[Row | QuarantinedRow]:
    """Read a Parquet table row by row, only the columns in `wanted`.

    Raises:
        DataError: the file is damaged.
    """
    import pyarrow
    import pyarrow.parquet

    line = 0
    try:
        table = pyarrow.parquet.ParquetFile(handle)
        names = table.schema_arrow.names
        known = [name for name in names if name in wanted]
        if not known:
            # No format fits, so every row will be quarantined: its column names are enough for the reason.
            yield from (Row(source_index, row, dict.fromkeys(names)) for row in range(1, table.metadata.num_rows + 1))
            return
        sizes = [table.metadata.row_group(group).total_byte_size for group in range(table.metadata.num_row_groups)]
        # Rows can be large, so limit a batch by bytes too.
        rows_at_once = max(1, min(PARQUET_ROWS, PARQUET_BYTES * table.metadata.num_rows // max(1, sum(sizes))))
        unread = _unread_columns(table, wanted)
        for batch in table.iter_batches(rows_at_once, columns=known):
            for row in _parquet_rows(source_index, line, batch, unread):
                line = row.line
                yield row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = str(error).splitlines()[0][:150]
        raise DataError(
            f"data file '{file}' is not a complete Parquet file (error after row {line}): {reason}"
        ) from None


def _unread_columns(table: Any, wanted: Collection[str]) -> tuple[str, ...]:
    """Return the columns that are not in `wanted`, without those that are empty according to the file's statistics."""
    metadata = table.metadata
    filled = set()
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for chunk in map(group.column, range(group.num_columns)):
            counted = chunk.statistics is not None and chunk.statistics.has_null_count
            if not counted or chunk.statistics.null_count < chunk.num_values:
                filled.add(chunk.path_in_schema)
    # The chunks of a nested column have its name, a dot and the name of a field.
    # Return one name more than the remarks may show, so that they say that there are further ones.
    return tuple(
        name
        for name, kind in zip(table.schema_arrow.names, table.schema_arrow.types, strict=True)
        if name not in wanted and kind != "null" and any(f"{path}.".startswith(f"{name}.") for path in filled)
    )[: MAX_NAMED + 1]


def _parquet_rows(source_index: int, line: int, batch: Any, unread: tuple[str, ...]) -> Iterator[Row | QuarantinedRow]:
    """Yield the rows of the batch, numbered from `line` + 1. Quarantine only the rows with an unreadable cell."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if batch.num_rows == 1:
            yield Row(source_index, line + 1, {}).quarantined(f"a cell cannot be read: {error}")
            return
        # One cell cannot be converted: convert row by row, so that only its row is rejected.
        for index in range(batch.num_rows):
            yield from _parquet_rows(source_index, line + index, batch.slice(index, 1), unread)
        return
    for index, columns in enumerate(rows, start=line + 1):
        yield Row(source_index, index, columns, unread).within_limit()
