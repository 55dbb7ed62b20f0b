"""Start the process that decodes a table, and read what it writes."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from qwlit.core.errors import DataError, one_line
from qwlit.data.files import FREE_BYTES, MOST_EXPANSION, File
from qwlit.data.rows import MAX_REASON, MAX_ROW_BYTES, QuarantinedRow, too_long
from qwlit.data.template_process import KEPT_VARIABLES

MEMORY_MIB = 256
"""Address space that the process may take beyond that of Python and pyarrow."""
SECONDS = 20
"""Time of the processor for one slice of a few MiB."""
REMEDY = "write it again in smaller row groups and pages, or as JSON lines"
# As in table_worker.py.
DETAILS, DONE = b"qwlit", b"done\n"
TableKind = Literal["Parquet", "Arrow"]


class _HasEnded(Exception):
    """The process ended before the request, because there was none for some time."""


class DecodedTable:
    """A table that a process decodes."""

    is_finished = False
    """Whether all is read, and the process can be asked for another table."""

    def __init__(
        self, file: File, kind: TableKind, wanted: Collection[str], process: "subprocess.Popen[bytes]"
    ) -> None:
        """Ask the process for the table; see `decoding`."""
        import pyarrow

        assert process.stdin is not None
        self._file, self._kind, self._process = file, kind, process
        limits = {
            "memory_mib": MEMORY_MIB,
            "seconds": SECONDS,
            "row_bytes": MAX_ROW_BYTES,
            "free_bytes": FREE_BYTES,
            "most_expansion": MOST_EXPANSION,
        }
        request = {"path": str(file.path.absolute()), "kind": kind, "wanted": sorted(wanted), "limits": limits}
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            self._stream = pyarrow.ipc.open_stream(process.stdout)
        except (pyarrow.ArrowException, OSError):
            self._check_end(0)
            raise _HasEnded from None
        self.column_names: list[str] = self._stream.schema.names
        self.details: dict[str, Any] = json.loads(self._stream.schema.metadata[DETAILS])

    def slices(self, source_index: int, line: int = 0) -> Iterator[Any]:
        """Yield the rows, numbered from `line` + 1, as Arrow batches, and a QuarantinedRow for one that is too long.

        Raises:
            DataError: the file is damaged, or it needs more than it may.
        """
        import pyarrow

        while True:
            try:
                batch, metadata = self._stream.read_next_batch_with_custom_metadata()
            except (StopIteration, pyarrow.ArrowException, OSError):
                break
            if metadata:
                line += 1
                yield quarantined_row(source_index, line, json.loads(metadata[DETAILS]))
            else:
                yield batch
                line += batch.num_rows
        self._check_end(line)

    def _check_end(self, line: int) -> None:
        """Raise DataError if the process failed to write the rows after `line`."""
        assert self._process.stdout is not None and self._process.stderr is not None
        if self._process.stdout.readline() == DONE:
            self.is_finished = True
            return
        self._process.stdout.close()
        lines = self._process.stderr.read().splitlines() or [b""]
        if code := self._process.wait():
            raise DataError(f"data file '{self._file}' {self._failure(lines[-1], code, f'after row {line}')}")

    def _failure(self, answer: bytes, code: int, where: str) -> str:
        try:
            failure = json.loads(answer)
        except ValueError:
            failure = {"damage": f"the process that reads it ended with exit code {code}"}
        if code == -signal.SIGPROF:
            failure = {"limit": f"needs more than {SECONDS} s of the processor for a few rows"}
        if "limit" in failure:
            return f"{failure['limit']} ({where}); {REMEDY}"
        damage = one_line((failure["damage"].splitlines() or ["damaged"])[0], MAX_REASON)
        return f"is not a complete {self._kind} file (error {where}): {damage}"


def quarantined_row(source_index: int, line: int, long: dict[str, Any]) -> QuarantinedRow:
    """Quarantine a row that is too long; `long` is what `table_worker.long_row` returns."""
    return QuarantinedRow(source_index, line, too_long(long["size"]), long["sha256"])


@contextmanager
def decoding(file: File, kind: TableKind, wanted: Collection[str] = ()) -> Iterator[DecodedTable]:
    """Decode the file in another process while the block runs.

    Args:
        wanted: the columns to read of a Parquet file; of an Arrow file, all are read.

    Raises:
        DataError: as `DecodedTable.slices`.
    """
    global _idle  # noqa: PLW0603 - one process decodes all tables of this process
    owner, process = _idle or (0, None)
    _idle = None
    if process is None or owner != os.getpid():
        process = _start()
    is_finished = False
    try:
        try:
            table = DecodedTable(file, kind, wanted, process)
        except _HasEnded:
            _end(process)
            process = _start()
            table = DecodedTable(file, kind, wanted, process)
        yield table
        is_finished = table.is_finished
    finally:
        if is_finished:
            _idle = os.getpid(), process
        else:
            _end(process)


_idle: "tuple[int, subprocess.Popen[bytes]] | None" = None
"""The process that can be asked for a table, and the process that started it."""


def _start() -> "subprocess.Popen[bytes]":
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    return subprocess.Popen(
        # -P: no file pyarrow.py of the current folder is imported. The session keeps the terminal's Ctrl-C away.
        [sys.executable, "-P", str(Path(__file__).with_name("table_worker.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Arrow's other allocators reserve more address space than the process may have.
        env=kept | {"ARROW_DEFAULT_MEMORY_POOL": "system"},
        start_new_session=True,
    )


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    with suppress(BrokenPipeError), process:
        pass
