"""Write a store: encode rows, append to arrays in a temporary folder, and rename the folder after the last row."""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwlit.core.disk import naming_path
from qwlit.core.errors import DataError
from qwlit.data.bad_files import BadFileCheck
from qwlit.data.blocks import HashedWriter
from qwlit.data.columns import check_found
from qwlit.data.encoded_batch import EncodedBatch, RowCounts
from qwlit.data.encoding import RowEncoder
from qwlit.data.readers import RowReader
from qwlit.data.rows import QuarantinedRow, Row
from qwlit.data.sample_limit import SampleLimit
from qwlit.data.sources import Source
from qwlit.data.store_folder import (
    COLUMNS,
    ENDS,
    FILES,
    MASK_BIT,
    QUARANTINE,
    TOKENS,
    TOKENS_DTYPE,
    array_file,
    remove,
    replace_folder,
    write_meta,
)
from qwlit.data.unread import add_remarks
from qwlit.data.workers import map_in_order, num_cores

# Part of the fingerprint, with which a run resumes: raise it when a change makes other samples of the same rows.
STORE_VERSION = 4
# Enough rows to be worth sending to another process, but few enough bytes that their tokens fit in memory.
BATCH_ROWS, BATCH_BYTES = 2000, 2 * 2**20
# For less data, starting the processes takes longer than the work. Measured: with Qwen's vocabulary one process starts
# in about 1 s, and tokenizes 2 MiB of conversations in another 1 s.
BYTES_WORTH_WORKERS = 8 * 2**20


@dataclass(frozen=True)
class BuildProgress:
    """How much of a store is built."""

    rows: int
    tokens: int
    bytes_read: int
    bytes_in_all: int
    """0 if it is unknown."""
    tokens_per_second: float
    cores: int
    finished: bool


ProgressCallback = Callable[[BuildProgress], None]


def store_fingerprint(sources: Sequence[Source], encoder: RowEncoder, cache_root: Path) -> str:
    """Hash everything that decides what is stored: of a file its name and content, but not its folder."""
    parts = [STORE_VERSION, encoder.fingerprint, [[source.name, source.digest(cache_root)] for source in sources]]
    return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()


def write_store(
    folder: Path, fingerprint: str, sources: Sequence[Source], encoder: RowEncoder, progress: ProgressCallback | None
) -> None:
    """Read, encode and store every row of `sources`, in place of a damaged store. The caller holds the lock.

    Raises:
        DataError: a file cannot be read or has changed meanwhile, a row stops the run (data.strict,
            data.too_long=error), or (NeedsTokenizer) there is text and no tokenizer.
    """
    # A killed process leaves its temporary folder. We hold the lock, so no living process uses it.
    for abandoned in folder.parent.glob(f".{folder.name}.*.tmp"):
        remove(abandoned)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    reader = RowReader(sources, encoder.config.columns)
    cores = num_cores()
    limit, check = SampleLimit(encoder), BadFileCheck(sources)
    batch_rows = min(BATCH_ROWS, encoder.config.max_samples or BATCH_ROWS)
    # A few samples are at the beginning of the data, however large the data are.
    is_large = reader.estimated_bytes >= BYTES_WORTH_WORKERS and batch_rows == BATCH_ROWS
    workers = cores if is_large else 1
    started = time.perf_counter()

    def report(writer: _StoreWriter, *, finished: bool = False) -> None:
        if progress:
            rows, tokens = writer.row_counts.read, writer.num_tokens
            speed = tokens / max(1e-9, time.perf_counter() - started)
            progress(BuildProgress(rows, tokens, reader.num_bytes_read, reader.num_bytes, speed, cores, finished))

    batches = map_in_order(encoder, limit.remember(_row_batches(reader, batch_rows)), workers)
    try:
        with closing(_StoreWriter(temporary)) as writer:
            for batch in map(limit.cut, batches):
                if batch.stop:
                    raise DataError(f"{sources[batch.stop.source]}:{batch.stop.line}: {batch.stop.reason}")
                check.add(batch)
                writer.add(batch)
                report(writer)
                if limit.reached:
                    break
            report(writer, finished=True)
        check_found(encoder.config.columns or {}, sources, writer.columns)
        writer.row_counts.duplicates = writer.count_duplicates(drop=encoder.config.drop_duplicates)
        facts = {
            "fingerprint": fingerprint,
            "account": asdict(writer.row_counts),
            "remarks": dict(writer.remarks),
            "stopped_early": limit.leaves_rows(),
        }
        write_meta(temporary, facts, writer.files.values())
        if store_fingerprint(sources, encoder, folder.parent) != fingerprint:
            raise DataError(f"'{sources[0]}' or a file beside it changed while it was read; start again")
        replace_folder(folder, temporary)
    finally:
        # After an error, stop the workers and leave no folder.
        batches.close()
        remove(temporary)


def _row_batches(rows: Iterable[Row | QuarantinedRow], most_rows: int) -> Iterator[list[Row | QuarantinedRow]]:
    batch: list[Row | QuarantinedRow] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += row.num_bytes() if isinstance(row, Row) else 0
        if len(batch) >= most_rows or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _StoreWriter:
    """Writes the arrays and the quarantine file, and adds up the row counts."""

    def __init__(self, folder: Path) -> None:
        self.num_tokens = 0
        self.row_counts = RowCounts()
        self.remarks: Counter[str] = Counter()
        self.columns: dict[int, set[str]] = {}
        self._open = ExitStack()
        self.files = {name: HashedWriter(folder / name) for name in FILES}
        for file in self.files.values():
            self._open.callback(file.close)

    def close(self) -> None:
        self._open.close()

    def add(self, batch: EncodedBatch) -> None:
        self.row_counts.add(batch.row_counts)
        add_remarks(self.remarks, batch.remarks)
        for source, names in batch.columns.items():
            self.columns.setdefault(source, set()).update(names)
        arrays = batch.arrays
        masked = arrays["tokens"].astype(TOKENS_DTYPE) | arrays["mask"].astype(TOKENS_DTYPE) << MASK_BIT
        self.files[array_file(TOKENS)].write(masked.tobytes())
        ends = self.num_tokens + np.cumsum(arrays["lengths"], dtype=np.int64)
        for name, dtype in COLUMNS.items():
            values = ends if name == ENDS else arrays[name]
            self.files[array_file(name)].write(values.astype(dtype, copy=False).tobytes())
        self.num_tokens += len(masked)
        rows = [json.dumps(asdict(row)) + "\n" for row in batch.quarantined_rows]
        self.files[QUARANTINE].write("".join(rows).encode("utf-8"))

    def count_duplicates(self, *, drop: bool) -> int:
        """Count samples with the tokens and mask of an earlier one, after `close`; `drop` removes them.

        Only the arrays with one number per sample shrink: the tokens stay on disk, but no sample points to them.
        """
        digests = self._column("digests")
        _, first = np.unique(digests, return_index=True)
        duplicates = len(digests) - len(first)
        if drop and duplicates:
            kept = np.sort(first)  # `np.unique` sorts by digest; keep the order of the data
            for name in COLUMNS:
                values = self._column(name)[kept]
                path = self.files[array_file(name)].path
                with closing(HashedWriter(path)) as file:
                    file.write(values.tobytes())
                self.files[path.name] = file
        return duplicates

    def _column(self, name: str) -> NDArray[Any]:
        path = self.files[array_file(name)].path
        with naming_path(path):
            return np.fromfile(path, COLUMNS[name])
