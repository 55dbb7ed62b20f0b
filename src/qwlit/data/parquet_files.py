"""Read the rows of Parquet files as dictionaries by column name."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from qwlit.core.errors import DataError, one_line
from qwlit.data.files import FREE_BYTES, MOST_EXPANSION, File
from qwlit.data.formats import READ_KEYS
from qwlit.data.row_labels import MARK_KEYS, REFUSABLE_KEYS
from qwlit.data.rows import MAX_REASON, MAX_ROW_BYTES, QuarantinedRow, Row, too_long
from qwlit.data.template_process import KEPT_VARIABLES
from qwlit.data.unread import MAX_NAMED

MEMORY_MIB = 256
"""Address space that the process may take beyond that of Python and pyarrow."""
SECONDS = 20
"""Time of the processor for one slice of a few MiB."""
MOST_NAMELESS_ROWS = 1000
"""So many rows of a file without a known column are quarantined before it is refused."""
DETAILS = b"qwlit"
REMEDY = "write it again in smaller row groups and pages, or as JSON lines"
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
    import pyarrow

    line = 0
    with _decoder(file, wanted) as process:
        try:
            stream = pyarrow.ipc.open_stream(process.stdout)
            details = json.loads(stream.schema.metadata[DETAILS])
            num_rows = details["num_rows"]
            if not stream.schema.names and num_rows:
                yield from _nameless_rows(source_index, file, num_rows, details["names"])
                return
            # One name more than the remarks may show, so that they say that there are further ones.
            unread = tuple(details["unread"][: MAX_NAMED + 1])
            while slice_ := _next_slice(stream):
                for row in _rows(source_index, line, *slice_, unread):
                    line = row.line
                    yield row
                handle.seek(file.num_bytes() * line // num_rows)
        except (pyarrow.ArrowException, OSError):
            pass  # the process says why
        if failure := _failure(process, line):
            raise DataError(f"data file '{file}' {failure}")


@contextmanager
def _decoder(file: File, wanted: Collection[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Start the process that decodes the file, and end it with the block."""
    limits = {
        "memory_mib": MEMORY_MIB,
        "seconds": SECONDS,
        "row_bytes": MAX_ROW_BYTES,
        "free_bytes": FREE_BYTES,
        "most_expansion": MOST_EXPANSION,
    }
    request = json.dumps({"wanted": sorted(wanted), "limits": limits})
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    process = subprocess.Popen(
        # -P: no file pyarrow.py of the current folder is imported. The session keeps the terminal's Ctrl-C away.
        [sys.executable, "-P", str(Path(__file__).with_name("parquet_worker.py")), str(file.path), request],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Arrow's other allocators reserve more address space than the process may have.
        env=kept | {"ARROW_DEFAULT_MEMORY_POOL": "system"},
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def _next_slice(stream: Any) -> tuple[Any, dict[str, Any]] | None:
    """Return the next rows as an Arrow batch, or an empty one and what is known of a row that is too long.

    None: there are no more rows.
    """
    try:
        batch, metadata = stream.read_next_batch_with_custom_metadata()
    except StopIteration:
        return None
    return batch, json.loads(metadata[DETAILS]) if metadata else {}


def _failure(process: subprocess.Popen[bytes], line: int) -> str | None:
    """Return why the process did not write the rows after `line`; None if it wrote the whole table."""
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    lines = process.stderr.read().splitlines() or [b""]
    code = process.wait()
    if not code:
        return None
    damage = f"the process that reads it ended with exit code {code}"
    try:
        answer = json.loads(lines[-1])
        if limit := answer.get("limit"):
            return f"{limit} (after row {line}); {REMEDY}"
        damage = one_line(answer["damage"].splitlines()[0], MAX_REASON)
    except ValueError:
        pass
    if code == -signal.SIGPROF:
        return f"needs more than {SECONDS} s of the processor for a few rows (after row {line}); {REMEDY}"
    return f"is not a complete Parquet file (error after row {line}): {damage}"


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


def _rows(
    source_index: int, line: int, batch: Any, long: dict[str, Any], unread: tuple[str, ...]
) -> Iterator[Row | QuarantinedRow]:
    """Yield the rows of the batch, numbered from `line` + 1. Quarantine only the rows with an unreadable cell."""
    if long:
        yield QuarantinedRow(source_index, line + 1, too_long(long["size"]), long["sha256"])
        return
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if batch.num_rows == 1:
            yield Row(source_index, line + 1, {}).quarantined(f"a cell cannot be read: {error}")
            return
        # One cell cannot be converted: convert row by row, so that only its row is rejected.
        for index in range(batch.num_rows):
            yield from _rows(source_index, line + index, batch.slice(index, 1), {}, unread)
        return
    for index, columns in enumerate(rows, start=line + 1):
        yield Row(source_index, index, columns, unread)
