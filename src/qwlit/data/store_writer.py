"""Writes a store: rows in, growing arrays out, and a finished folder only when the last row is in it."""

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from qwlit.core.errors import DataError
from qwlit.core.files import fsync_folder, write_json_atomic
from qwlit.data.encoding import RowEncoder
from qwlit.data.outcome import DTYPES, Account, Batch
from qwlit.data.readers import RowReader
from qwlit.data.rows import Reject, Row
from qwlit.data.sources import Source
from qwlit.data.unread import add_remarks
from qwlit.data.workers import map_in_order, num_cores

# Part of the fingerprint: raise it whenever the same rows would be stored differently.
STORE_VERSION = 4
# Enough rows to be worth sending to another process, and few enough bytes for their tokens to fit in memory.
BATCH_ROWS, BATCH_BYTES = 2000, 2 * 2**20
# Below, the processes take longer to start than the work; measured: one starts in about a second with Qwen's
# vocabulary and tokenizes 2 MiB of conversations in another.
BYTES_WORTH_WORKERS = 8 * 2**20
ENDS = "ends"
QUARANTINE = "quarantine.jsonl"
ARRAYS = {**DTYPES, ENDS: "<i8"}
PER_SAMPLE = [name for name in ARRAYS if name not in ("tokens", "mask")]


@dataclass(frozen=True)
class Reading:
    """How far a build is."""

    rows: int
    tokens: int
    bytes_read: int
    bytes_in_all: int
    """0 where nobody knows."""
    tokens_per_second: float
    finished: bool = False
    cores: int = 1


Progress = Callable[[Reading], None]


class Clock:
    """Tells `progress` how a build goes."""

    def __init__(self, reader: RowReader, cores: int, progress: Progress | None) -> None:
        self._reader, self._cores, self._progress = reader, cores, progress
        self._started = time.perf_counter()

    def tell(self, rows: int, tokens: int, *, finished: bool = False) -> Reading:
        rate = tokens / max(1e-9, time.perf_counter() - self._started)
        reader = self._reader
        reading = Reading(rows, tokens, reader.num_bytes_read, reader.num_bytes, rate, finished, self._cores)
        if self._progress:
            self._progress(reading)
        return reading


def write_store(
    folder: Path,
    fingerprint: str,
    sources: Sequence[Source],
    encode: RowEncoder,
    progress: Progress | None,
    still_the_same: Callable[[], bool],
) -> None:
    """Read, encode and store every row of `sources`. The caller holds the lock on `folder`.

    Args:
        still_the_same: asked at the end whether the sources are what the fingerprint was taken of.

    Raises:
        DataError: a file cannot be read or changed meanwhile, a row ends the reading (data.strict,
            data.too_long=error), or (NeedsTokenizer) there is text and no tokenizer.
    """
    for abandoned in folder.parent.glob(f".{folder.name}.*.tmp"):
        shutil.rmtree(abandoned, ignore_errors=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    reader = RowReader(sources)
    cores = num_cores()
    workers = cores if reader.estimated_bytes >= BYTES_WORTH_WORKERS else 1
    clock = Clock(reader, cores, progress)
    batches = map_in_order(encode, _batches(reader), workers)
    try:
        with _StoreWriter(temporary) as writer:
            for batch in batches:
                if batch.stop:
                    raise DataError(f"{sources[batch.stop.source]}:{batch.stop.line}: {batch.stop.reason}")
                writer.add(batch)
                clock.tell(writer.account.read, writer.num_tokens)
            reading = clock.tell(writer.account.read, writer.num_tokens, finished=True)
        account = writer.account
        account.duplicates = _mark_duplicates(temporary, drop=encode.config.drop_duplicates)
        meta = {
            "fingerprint": fingerprint,
            "account": asdict(account),
            "remarks": dict(writer.remarks),
            "tokens_per_second": round(reading.tokens_per_second),
            "cores": cores,
        }
        write_json_atomic(temporary / "meta.json", meta)
        if not still_the_same():
            raise DataError(f"'{sources[0]}' or a file beside it changed while it was read; start again")
        temporary.rename(folder)
        fsync_folder(folder.parent)
    finally:
        batches.close()
        shutil.rmtree(temporary, ignore_errors=True)


def _batches(rows: Iterable[Row | Reject]) -> Iterator[list[Row | Reject]]:
    batch: list[Row | Reject] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += row.num_bytes() if isinstance(row, Row) else 0
        if len(batch) >= BATCH_ROWS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _GrowingArray:
    """A one-dimensional .npy file that is written front to back."""

    def __init__(self, path: Path, dtype: str) -> None:
        self._handle = path.open("w+b")
        self._dtype = np.dtype(dtype)
        self._length = 0
        self._write_header()

    def _write_header(self) -> None:
        # numpy pads the header for the length to grow in place.
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._length,)}
        self._handle.seek(0)
        npy.write_array_header_1_0(self._handle, header)  # type: ignore[no-untyped-call]

    def extend(self, values: NDArray[Any]) -> None:
        self._handle.write(values.astype(self._dtype, copy=False).tobytes())
        self._length += values.size

    def close(self) -> None:
        self._write_header()
        self._handle.flush()
        os.fsync(self._handle.fileno())
        self._handle.close()


class _StoreWriter:
    """Keeps the arrays, the quarantine and the account in step."""

    def __init__(self, folder: Path) -> None:
        self.num_tokens = 0
        self.account = Account()
        self.remarks: Counter[str] = Counter()
        self._open = ExitStack()
        self._arrays = {name: _GrowingArray(folder / f"{name}.npy", dtype) for name, dtype in ARRAYS.items()}
        for array in self._arrays.values():
            self._open.callback(array.close)
        self._quarantine = self._open.enter_context((folder / QUARANTINE).open("w", encoding="utf-8"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def add(self, batch: Batch) -> None:
        self.account.add(batch.account)
        add_remarks(self.remarks, batch.remarks)
        for name, values in batch.arrays.items():
            self._arrays[name].extend(values)
        self._arrays[ENDS].extend(self.num_tokens + np.cumsum(batch.arrays["lengths"], dtype=np.int64))
        self.num_tokens += len(batch.arrays["tokens"])
        for reject in batch.rejects:
            self._quarantine.write(json.dumps(asdict(reject)) + "\n")


def _mark_duplicates(folder: Path, *, drop: bool) -> int:
    """Count samples with the tokens and mask of an earlier one, and with `drop` take them out; the tokens stay."""
    digests = np.load(folder / "digests.npy")
    _, first = np.unique(digests, return_index=True)
    duplicates = len(digests) - len(first)
    if drop and duplicates:
        kept = np.sort(first)
        for name in PER_SAMPLE:
            np.save(folder / f"{name}.npy", np.load(folder / f"{name}.npy")[kept])
    return duplicates
