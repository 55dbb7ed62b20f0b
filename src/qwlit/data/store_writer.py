"""Writes a store: rows in, growing arrays out, and a finished folder only when the last row is in it."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from qwlit.core.errors import DataError
from qwlit.core.files import fsync_folder, write_json_atomic
from qwlit.data.chat import ChatEncoder
from qwlit.data.config import DataConfig
from qwlit.data.rows import Conversation, EncodedSample, NeedsTokenizer, RowError, parse_row
from qwlit.data.sources import Reject, Row, read_rows

# Part of the fingerprint: raise it whenever the same rows would be stored differently.
STORE_VERSION = 1
# Enough rows to keep all cores busy, and few enough bytes for their tokens to fit in memory.
BATCH_ROWS, BATCH_BYTES = 1000, 16 * 2**20
ARRAYS = {
    "tokens": "<i4",
    "mask": "|u1",
    "lengths": "<i4",
    "num_supervised": "<i4",
    "ends": "<i8",
    "digests": "<u8",
    "files": "<i4",
    "lines": "<i4",
}
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Account:
    """What became of every row: accepted + too_long + quarantined = read."""

    read: int
    accepted: int
    too_long: int
    quarantined: int


@dataclass(frozen=True)
class RowEncoder:
    """From rows to samples, each with its own outcome."""

    config: DataConfig
    encoder: ChatEncoder | None
    vocab_size: int

    def __call__(self, rows: Iterable[Row | Reject]) -> Iterator[tuple[Row | Reject, EncodedSample | Reject]]:
        """Yield each row with its sample, or with the reason that it has none."""
        parsed = [(row, self._parse(row)) for row in rows]
        conversations = [value for _, value in parsed if isinstance(value, Conversation)]
        encoded = iter(self.encoder.encode_batch(conversations) if self.encoder else ())
        for row, value in parsed:
            sample = next(encoded) if isinstance(value, Conversation) else value
            if isinstance(row, Row) and isinstance(sample, EncodedSample) and 1 not in sample.loss_mask:
                sample = row.reject("nothing in it is supervised")
            yield row, sample

    def _parse(self, row: Row | Reject) -> Conversation | EncodedSample | Reject:
        if isinstance(row, Reject):
            return row
        try:
            value = parse_row(row.value, self.config.format, self.vocab_size)
            if isinstance(value, Conversation):
                if self.encoder is None:
                    where = f"{row.file}:{row.line}"
                    raise NeedsTokenizer(f"{where}: messages need a tokenizer, and the model comes with none")
                self.encoder.check(value)
        except RowError as error:
            return row.reject(str(error))
        return value


def write_store(
    folder: Path, fingerprint: str, files: list[Path], encode_rows: RowEncoder, progress: Progress | None
) -> None:
    """Read, encode and store every row of `files`. The caller holds the lock on `folder`.

    Raises:
        DataError: a file cannot be read; a conversation without a tokenizer (NeedsTokenizer); with `strict`, a bad row.
    """
    for abandoned in folder.parent.glob(f".{folder.name}.*.tmp"):
        shutil.rmtree(abandoned, ignore_errors=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    config = encode_rows.config
    try:
        with _StoreWriter(temporary, files, config.max_seq_len) as writer:
            for batch in _batches(read_rows(files)):
                for row, outcome in encode_rows(batch):
                    if config.strict and isinstance(outcome, Reject):
                        raise strict_stop(outcome.file, outcome.line, outcome.reason)
                    writer.add(row, outcome)
                if progress:
                    progress(writer.account.read)
        write_json_atomic(temporary / "meta.json", {"fingerprint": fingerprint, "account": asdict(writer.account)})
        temporary.rename(folder)
        fsync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def strict_stop(file: Path | str, line: int, reason: str) -> DataError:
    return DataError(f"{file}:{line}: {reason} (data.strict=true stops at the first bad row)")


def _batches(rows: Iterable[Row | Reject]) -> Iterator[list[Row | Reject]]:
    batch: list[Row | Reject] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += len(row.raw) if isinstance(row, Row) else 0
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

    def extend(self, values: Any) -> None:
        array: NDArray[Any] = np.asarray(values, dtype=self._dtype)
        self._handle.write(array.tobytes())
        self._length += array.size

    def close(self) -> None:
        self._write_header()
        self._handle.flush()
        os.fsync(self._handle.fileno())
        self._handle.close()


class _StoreWriter:
    """Keeps the arrays, the quarantine and the account in step."""

    def __init__(self, folder: Path, files: list[Path], max_seq_len: int) -> None:
        self._max_seq_len = max_seq_len
        self._number_of = {file: number for number, file in enumerate(files)}
        self._end = self._accepted = self._too_long = self._quarantined = 0
        self._open = ExitStack()
        self._arrays = {name: _GrowingArray(folder / f"{name}.npy", dtype) for name, dtype in ARRAYS.items()}
        for array in self._arrays.values():
            self._open.callback(array.close)
        self._quarantine = self._open.enter_context((folder / "quarantine.jsonl").open("w", encoding="utf-8"))

    def __enter__(self) -> "_StoreWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    @property
    def account(self) -> Account:
        read = self._accepted + self._too_long + self._quarantined
        return Account(read, self._accepted, self._too_long, self._quarantined)

    def add(self, row: Row | Reject, outcome: EncodedSample | Reject) -> None:
        file = self._number_of[row.file]
        if isinstance(outcome, Reject):
            self._quarantined += 1
            entry = {"file": file, "line": outcome.line, "reason": outcome.reason, "sha256": outcome.sha256}
            self._quarantine.write(json.dumps(entry) + "\n")
        elif len(outcome.input_ids) > self._max_seq_len:
            self._too_long += 1
        else:
            self._accepted += 1
            self._append(outcome, file, row.line)

    def _append(self, sample: EncodedSample, file: int, line: int) -> None:
        tokens = np.asarray(sample.input_ids, dtype=np.int32)
        self._end += len(tokens)
        values = {
            "tokens": tokens,
            "mask": sample.loss_mask,
            "lengths": len(tokens),
            "num_supervised": sum(sample.loss_mask),
            "ends": self._end,
            "digests": int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=8).digest(), "little"),
            "files": file,
            "lines": line,
        }
        for name, value in values.items():
            self._arrays[name].extend(value)
