"""Decode a Parquet or Arrow file in a process with limits: a few bytes can expand to any number of rows and values.

`table_process.py` runs this file as a script. It reads requests from standard input. It writes each table to standard
output as a stream in Arrow's format, in slices of limited size, and a failure to standard error as one line of JSON. It
imports nothing of qwlit, so it starts quickly.
"""

import contextlib
import hashlib
import json
import os
import resource
import select
import signal
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.parquet
from pyarrow import types

VALUE_BYTES, OBJECT_BYTES = 8, 80
"""What a value, and what a list or an object, counts in the size of a row beside the bytes of texts. So a row cannot
have more than 100,000 lists and objects."""
READ_BYTES = 2**20
"""How much of a column is read from the file at once."""
BATCH_ROWS, BATCH_BYTES = 1000, 4 * 2**20
FEWER_ROWS = (16, 1)
"""Rows that are decoded at once where more need too much memory."""
MOST_ROWS = 10**6
"""Rows that a file of any size may have; a larger one has a byte for each row."""
TEXTS = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary, types.is_fixed_size_binary)
IDLE_SECONDS = 30.0
"""The process ends when it gets no request for so long; a training lasts much longer than its reading of files."""
DONE = b"done\n"
"""Follows the stream of a whole table."""
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


@dataclass(frozen=True)
class Table:
    """A table that is read batch by batch."""

    schema: Any
    details: dict[str, Any]
    batches: Iterator[Any]


def parquet_table(path: str, wanted: Collection[str]) -> Table:
    """Open a Parquet file to read its columns that are in `wanted`."""
    file = pyarrow.parquet.ParquetFile(pyarrow.OSFile(path), buffer_size=READ_BYTES, pre_buffer=False)
    names, num_rows = file.schema_arrow.names, file.metadata.num_rows
    known = [name for name in names if name in wanted]
    schema = pyarrow.schema([file.schema_arrow.field(name) for name in known])
    details = {"names": names, "num_rows": num_rows, "unread": _unread_columns(file, wanted)}
    return Table(schema, details, _parquet_batches(file, known) if known else iter(()))


def arrow_table(path: str) -> Table:
    """Open a file that `datasets` wrote: a stream in Arrow's format."""
    stream = pyarrow.ipc.open_stream(pyarrow.memory_map(path))
    return Table(stream.schema, {}, _checked_batches(stream))


def write(table: Table, num_bytes: int, limits: Limits) -> None:
    """Write the table to standard output.

    Args:
        num_bytes: size of the file.

    Raises:
        OverLimit: the file needs more than it may.
        MemoryError: it needs more memory.
        ArrowException, OSError, ValueError, OverflowError: it is damaged.
    """
    most_bytes = max(limits.free_bytes, limits.most_expansion * num_bytes)
    most_rows = max(MOST_ROWS, num_bytes)
    if table.details.get("num_rows", 0) > most_rows:
        raise OverLimit(f"has {table.details['num_rows']:,} rows in {num_bytes:,} bytes")
    schema = table.schema.with_metadata((table.schema.metadata or {}) | {DETAILS: json.dumps(table.details)})
    with pyarrow.ipc.new_stream(sys.stdout.buffer, schema) as stream:
        for batch in table.batches:
            for rows, size in slices(batch, limits.row_bytes):
                signal.setitimer(signal.ITIMER_PROF, limits.seconds)
                most_bytes -= size
                most_rows -= rows.num_rows
                if most_bytes < 0 or most_rows < 0:
                    raise OverLimit(f"expands to more than {limits.most_expansion} times its size")
                if size <= limits.row_bytes:
                    stream.write_batch(rows)
                else:
                    stream.write_batch(rows.slice(0, 0), custom_metadata={DETAILS: json.dumps(long_row(rows, size))})


def long_row(row: Any, size: int) -> dict[str, Any]:
    """Return what the quarantine needs to know of a row that is too long."""
    return {"size": size, "sha256": hashlib.sha256(row.serialize()).hexdigest()}


def _checked_batches(stream: Any) -> Iterator[Any]:
    for batch in stream:
        # The bytes of the file are used as they are: at a wrong place, a text would be outside of the memory.
        batch.validate(full=True)
        for start in range(0, batch.num_rows, BATCH_ROWS):
            yield batch.slice(start, BATCH_ROWS)


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


def _parquet_batches(table: Any, columns: list[str]) -> Iterator[Any]:
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


def slices(batch: Any, most_bytes: int) -> Iterator[tuple[Any, int]]:
    """Yield the rows of the batch in slices that are not too large, or have one row, each with its size."""
    size = sum(map(size_of, batch.columns))
    if size <= most_bytes or batch.num_rows == 1:
        yield batch, size
    else:
        half = batch.num_rows // 2
        yield from slices(batch.slice(0, half), most_bytes)
        yield from slices(batch.slice(half), most_bytes)


def size_of(values: Any) -> int:
    """Return about how many bytes the values of an Arrow array have as JSON."""
    kind = values.type
    if isinstance(kind, pyarrow.BaseExtensionType):
        return size_of(values.storage)
    if types.is_dictionary(kind) and not _is_text(kind.value_type):
        return size_of(values.dictionary_decode())
    each = OBJECT_BYTES if types.is_nested(kind) else VALUE_BYTES
    return each * len(values) + _text_bytes(values) + sum(map(size_of, _inner(values)))


def _text_bytes(values: Any) -> int:
    if types.is_dictionary(values.type):
        lengths = pyarrow.compute.binary_length(values.dictionary).take(values.indices)
    elif _is_text(values.type):
        lengths = pyarrow.compute.binary_length(values)
    else:
        return 0
    return pyarrow.compute.sum(lengths).as_py() or 0


def _is_text(kind: Any) -> bool:
    return any(is_kind(kind) for is_kind in TEXTS)


def _inner(values: Any) -> Sequence[Any]:
    """Return the values inside of objects, maps and lists, one level deeper."""
    if types.is_struct(values.type):
        return [*(values.drop_null() if values.null_count else values).flatten()]
    if types.is_map(values.type):
        start, end = (values.offsets[place].as_py() for place in (0, -1))
        return [part.slice(start, end - start) for part in (values.keys, values.items)]
    return [values.flatten()] if types.is_nested(values.type) else []


def _limit(most_bytes: int) -> None:
    """Let this process have only so much more memory."""
    pages = Path("/proc/self/statm")
    in_use = int(pages.read_text().split()[0]) * resource.getpagesize() if pages.exists() else 0
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    # macOS refuses a limit of the address space.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (in_use + most_bytes, hard))


def answer(request: Mapping[str, Any]) -> dict[str, str]:
    """Write the table that is asked for; return {}, or what is wrong as {"limit" or "damage": what}."""
    path, limits = request["path"], Limits(**request["limits"])
    is_parquet = request["kind"] == "Parquet"
    # Where the time of the processor is used up, the signal ends the process, also inside of one long operation.
    signal.setitimer(signal.ITIMER_PROF, limits.seconds)
    try:
        num_bytes = Path(path).stat().st_size
        # An Arrow file is mapped into the address space.
        _limit(limits.memory_mib * 2**20 + (0 if is_parquet else num_bytes))
        write(parquet_table(path, request["wanted"]) if is_parquet else arrow_table(path), num_bytes, limits)
        return {}
    except BrokenPipeError:
        os._exit(0)  # the reader has read enough
    except OverLimit as error:
        return {"limit": str(error)}
    except MemoryError:
        return {"limit": f"needs more than {limits.memory_mib} MiB of memory"}
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        return {"damage": str(error)}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> None:
    """Answer requests, each a line of JSON, until standard input is closed or nobody asks; end at a failure."""
    while select.select([sys.stdin], [], [], IDLE_SECONDS)[0] and (line := sys.stdin.readline()):
        if failure := answer(json.loads(line)):
            print(json.dumps(failure), file=sys.stderr, flush=True)
            os._exit(1)
        sys.stdout.buffer.write(DONE)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
