"""Read the rows of Parquet files as dictionaries by column name."""

from collections.abc import Collection, Iterator
from typing import Any, BinaryIO

from qwlit.core.errors import DataError
from qwlit.data.files import File
from qwlit.data.formats import READ_KEYS
from qwlit.data.row_labels import MARK_KEYS, REFUSABLE_KEYS
from qwlit.data.rows import QuarantinedRow, Row
from qwlit.data.table_process import decoding
from qwlit.data.unread import MAX_NAMED

MOST_NAMELESS_ROWS = 1000
"""So many rows of a file without a known column are quarantined before it is refused."""
# The columns that formats read, and those for which a row may be refused or not supervised.
KNOWN_COLUMNS = REFUSABLE_KEYS.union(MARK_KEYS, *READ_KEYS.values())


def read_parquet(
    source_index: int, file: File, handle: BinaryIO, *, wanted: Collection[str]
) -> Iterator[Row | QuarantinedRow]:
    """Read a Parquet table row by row, only the columns in `wanted`.

    Args:
        handle: not read; its position follows the rows, for the progress.

    Raises:
        DataError: the file is damaged, needs more memory than it may, or has none of the columns.
    """
    line = 0
    with decoding(file, "Parquet", wanted) as table:
        num_rows = table.details["num_rows"]
        if not table.column_names and num_rows:
            yield from _nameless_rows(source_index, file, num_rows, table.details["names"])
            return
        # One name more than the remarks may show, so that they say that there are further ones.
        unread = tuple(table.details["unread"][: MAX_NAMED + 1])
        for part in table.slices(source_index):
            rows = [part] if isinstance(part, QuarantinedRow) else _rows(source_index, line, part, unread)
            for row in rows:
                line = row.line
                yield row
            handle.seek(file.num_bytes() * line // max(1, line, num_rows))


def _nameless_rows(source_index: int, file: File, num_rows: int, names: list[str]) -> Iterator[Row]:
    """Yield rows of a file of which no column is known: its column names are enough for the reason.

    Raises:
        DataError: there are many rows.
    """
    for line in range(1, min(num_rows, MOST_NAMELESS_ROWS) + 1):
        yield Row(source_index, line, dict.fromkeys(names))
    if num_rows > MOST_NAMELESS_ROWS:
        raise DataError(
            f"none of the {num_rows:,} rows of data file '{file}' can be used: no format reads its columns"
            f" ({', '.join(names[:MAX_NAMED])}); name those that it should read in data.columns"
        )


def _rows(source_index: int, line: int, batch: Any, unread: tuple[str, ...]) -> Iterator[Row | QuarantinedRow]:
    """Yield the rows of the batch, numbered from `line` + 1. Quarantine only the rows with an unreadable cell."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if batch.num_rows == 1:
            yield Row(source_index, line + 1, {}).quarantined(f"a cell cannot be read: {error}")
            return
        # One cell cannot be converted: convert row by row, so that only its row is rejected.
        for index in range(batch.num_rows):
            yield from _rows(source_index, line + index, batch.slice(index, 1), unread)
        return
    for index, columns in enumerate(rows, start=line + 1):
        yield Row(source_index, index, columns, unread)
