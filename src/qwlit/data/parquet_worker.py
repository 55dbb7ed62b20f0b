"""Decode a Parquet file in a process with limits: some bytes of a file can expand to any number of rows and values.

`parquet_files.py` runs this file as a script. It writes the table to standard output as a stream in Arrow's format,
in slices of limited size, and a failure to standard error as one line of JSON. It imports nothing of qwlit, so it
starts quickly.
"""

import contextlib
import hashlib
import json
import os
import resource
import signal
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.parquet
from pyarrow import types

VALUE_BYTES = 8
"""What a value, a list or an object counts in the size of a row, beside the bytes of texts."""
READ_BYTES = 2**20
"""How much of a column is read from the file at once."""
BATCH_ROWS, BATCH_BYTES = 1000, 4 * 2**20
FEWER_ROWS = (16, 1)
"""Rows that are decoded at once where more need too much memory."""
MOST_ROWS = 10**6
"""Rows that a file of any size may have; a larger one has a byte for each row."""
TEXTS = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary, types.is_fixed_size_binary)
DETAILS = b"qwlit"
"""Key of what the reader must know beside the columns: in the schema, and of rows that are too long."""


class OverLimit(Exception):
    """The file needs more than it may; the message says of what."""


@dataclass(frozen=True)
class Limits:
    """What a file may need."""

    memory_mib: int
    """Address space beyond that of Python and pyarrow."""
    seconds: int
    """Time of the processor for one slice."""
    row_bytes: int
    """Largest size of a row and of a slice."""
    free_bytes: int
    """Size of all rows that a file of any size may have."""
    most_expansion: int
    """How many times the size of a larger file its rows may have."""


def decode(path: str, wanted: Collection[str], limits: Limits) -> None:
    """Write the columns in `wanted` to standard output.

    Raises:
        OverLimit: the file needs more than it may.
        MemoryError: it needs more memory.
        ArrowException, OSError, ValueError, OverflowError: it is damaged.
    """
    num_bytes = Path(path).stat().st_size
    with pyarrow.OSFile(path) as handle:
        table = pyarrow.parquet.ParquetFile(handle, buffer_size=READ_BYTES, pre_buffer=False)
        num_rows = table.metadata.num_rows
        if num_rows > max(MOST_ROWS, num_bytes):
            raise OverLimit(f"has {num_rows:,} rows in {num_bytes:,} bytes")
        names = table.schema_arrow.names
        known = [name for name in names if name in wanted]
        details = {"names": names, "num_rows": num_rows, "unread": _unread_columns(table, wanted)}
        schema = pyarrow.schema([table.schema_arrow.field(name) for name in known], {DETAILS: json.dumps(details)})
        with pyarrow.ipc.new_stream(sys.stdout.buffer, schema) as stream:
            most = max(limits.free_bytes, limits.most_expansion * num_bytes)
            for batch in _batches(table, known) if known else ():
                for rows, size in _slices(batch, limits.row_bytes):
                    signal.setitimer(signal.ITIMER_PROF, limits.seconds)
                    most -= size
                    if most < 0:
                        raise OverLimit(f"expands to more than {limits.most_expansion} times its size")
                    if size <= limits.row_bytes:
                        stream.write_batch(rows)
                    else:
                        digest = hashlib.sha256(rows.serialize()).hexdigest()
                        long = {"size": size, "sha256": digest}
                        stream.write_batch(rows.slice(0, 0), custom_metadata={DETAILS: json.dumps(long)})


def _unread_columns(table: Any, wanted: Collection[str]) -> list[str]:
    """Return the columns that are not in `wanted`, without those that are empty according to the file's statistics."""
    metadata = table.metadata
    filled = set()
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for chunk in map(group.column, range(group.num_columns)):
            counted = chunk.statistics is not None and chunk.statistics.has_null_count
            if not counted or chunk.statistics.null_count < chunk.num_values:
                filled.add(chunk.path_in_schema)
    # The chunks of a nested column have its name, a dot and the name of a field.
    return [
        name
        for name, kind in zip(table.schema_arrow.names, table.schema_arrow.types, strict=True)
        if name not in wanted and kind != "null" and any(f"{path}.".startswith(f"{name}.") for path in filled)
    ]


def _batches(table: Any, columns: list[str]) -> Iterator[Any]:
    """Yield all rows, fewer at once where they need too much memory."""
    metadata = table.metadata
    num_bytes = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    most_rows = max(1, min(BATCH_ROWS, BATCH_BYTES * metadata.num_rows // max(1, num_bytes)))
    for group in range(metadata.num_row_groups):
        done = 0
        for num_rows in (most_rows, *(fewer for fewer in FEWER_ROWS if fewer < most_rows)):
            position = 0
            try:
                for batch in table.iter_batches(num_rows, [group], columns, use_threads=False):
                    new = batch.slice(max(0, done - position))
                    position += batch.num_rows
                    if new.num_rows:
                        done = position
                        yield new
                break
            except MemoryError:
                if num_rows == 1:
                    raise


def _slices(batch: Any, most_bytes: int) -> Iterator[tuple[Any, int]]:
    """Yield the rows of the batch in slices that are not too large, or have one row, each with its size."""
    size = sum(map(size_of, batch.columns))
    if size <= most_bytes or batch.num_rows == 1:
        yield batch, size
    else:
        half = batch.num_rows // 2
        yield from _slices(batch.slice(0, half), most_bytes)
        yield from _slices(batch.slice(half), most_bytes)


def size_of(values: Any) -> int:
    """Return about how many bytes the values of an Arrow array have as JSON, as `Row.num_bytes` does."""
    kind = values.type
    own = VALUE_BYTES * len(values)
    if isinstance(kind, pyarrow.BaseExtensionType):
        return size_of(values.storage)
    if types.is_dictionary(kind):
        return size_of(values.dictionary_decode())
    if types.is_struct(kind):
        return own + sum(map(size_of, (values.drop_null() if values.null_count else values).flatten()))
    if types.is_map(kind):
        start, end = (values.offsets[place].as_py() for place in (0, -1))
        return own + sum(size_of(part.slice(start, end - start)) for part in (values.keys, values.items))
    if types.is_nested(kind):
        return own + size_of(values.flatten())
    if any(is_kind(kind) for is_kind in TEXTS):
        return own + (pyarrow.compute.sum(pyarrow.compute.binary_length(values)).as_py() or 0)
    return own


def _limit(limits: Limits) -> None:
    """Let this process have only so much more memory, and write no files."""
    pages = Path("/proc/self/statm")
    in_use = int(pages.read_text().split()[0]) * resource.getpagesize() if pages.exists() else 0
    for limit, value in ((resource.RLIMIT_AS, in_use + limits.memory_mib * 2**20), (resource.RLIMIT_CORE, 0)):
        # macOS refuses a limit of the address space.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(limit, (value, value))


def main() -> None:
    """Decode the file of the first argument; the second is JSON: the columns, and `Limits`."""
    request = json.loads(sys.argv[2])
    limits = Limits(**request["limits"])
    _limit(limits)
    # Where the time of the processor is used up, the signal ends the process, also inside of one long operation.
    signal.setitimer(signal.ITIMER_PROF, limits.seconds)
    try:
        decode(sys.argv[1], request["wanted"], limits)
        failure = {}
    except BrokenPipeError:
        os._exit(0)  # the reader has read enough
    except OverLimit as error:
        failure = {"limit": str(error)}
    except MemoryError:
        failure = {"limit": f"needs more than {limits.memory_mib} MiB of memory"}
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        failure = {"damage": str(error)}
    if failure:
        print(json.dumps(failure), file=sys.stderr, flush=True)
        os._exit(1)


if __name__ == "__main__":
    main()
