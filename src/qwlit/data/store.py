"""Samples tokenized once into memory-mapped arrays, in a folder named by a fingerprint of all that shapes them.

Every row read is accepted, too long or quarantined; nothing else can happen to it. N samples of T tokens each.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwlit.core.errors import DataError
from qwlit.core.files import locked, read_json_lines
from qwlit.data.chat import ChatEncoder
from qwlit.data.config import DataConfig
from qwlit.data.sources import find_files
from qwlit.data.store_writer import ARRAYS, STORE_VERSION, Account, Progress, RowEncoder, strict_stop, write_store

# So few bad rows never stop a run, or one typo would in a small data set.
BAD_ROWS_ALLOWED = 3


class SampleStore:
    """A finished store, opened for reading; the arrays stay on disk until they are touched."""

    def __init__(self, folder: Path, files: list[Path]) -> None:
        """Open `folder`; `files` are the data files it was made of, wherever they lie today."""
        self._folder, self._files = folder, files
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.fingerprint: str = meta["fingerprint"]
        self.account = Account(**meta["account"])
        rejects = read_json_lines(folder / "quarantine.jsonl")
        self.quarantine: list[dict[str, Any]] = [r | {"file": str(files[r["file"]])} for r in rejects]
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in ARRAYS}
        self.lengths: NDArray[np.int32] = arrays["lengths"]
        self.num_supervised: NDArray[np.int32] = arrays["num_supervised"]
        self.digests: NDArray[np.uint64] = arrays["digests"]
        self._tokens, self._mask, self._ends = arrays["tokens"], arrays["mask"], arrays["ends"]
        self._file_of, self._line_of = arrays["files"], arrays["lines"]

    def __reduce__(self) -> tuple[type["SampleStore"], tuple[Path, list[Path]]]:
        # A worker process opens the files itself instead of receiving copies of them.
        return SampleStore, (self._folder, self._files)

    def __len__(self) -> int:
        return len(self.lengths)

    def sample(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Return the sample's tokens and loss mask, (T,) each, read-only views."""
        end = int(self._ends[index])
        start = end - int(self.lengths[index])
        return self._tokens[start:end], self._mask[start:end]

    def origin(self, index: int) -> str:
        """Return "file:line" of the row that the sample was."""
        return f"{self._files[self._file_of[index]]}:{self._line_of[index]}"


class StoreView:
    """Some of a store's samples, numbered from 0, as if they were a store."""

    def __init__(self, store: SampleStore, indices: NDArray[np.int32], fingerprint: str) -> None:
        self._store, self._indices = store, indices
        self.fingerprint = fingerprint
        self.lengths: NDArray[np.int32] = store.lengths[indices]
        self.num_supervised: NDArray[np.int32] = store.num_supervised[indices]

    def __len__(self) -> int:
        return len(self._indices)

    def sample(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """See `SampleStore.sample`."""
        return self._store.sample(int(self._indices[index]))

    def origin(self, index: int) -> str:
        """See `SampleStore.origin`."""
        return self._store.origin(int(self._indices[index]))


def build_store(
    path: str,
    config: DataConfig,
    *,
    encoder: ChatEncoder | None,
    vocab_size: int,
    cache_root: Path,
    progress: Progress | None = None,
) -> SampleStore:
    """Return the store of the rows under `path`, built now unless it has been before.

    Processes that start together build it once; one that is killed leaves nothing that looks finished.

    Args:
        encoder: turns conversations into tokens; None where only tokenized rows are expected.
        vocab_size: the model's; every token id must lie below it.
        progress: called with the number of rows read so far.

    Raises:
        DataError: no usable row, too many bad ones (with `strict`: one), or or (NeedsTokenizer)
            conversations and no encoder.
    """
    files = find_files(path)
    fingerprint = _fingerprint(files, config, encoder, vocab_size)
    folder = cache_root / fingerprint[:32]
    if not folder.is_dir():
        with locked(cache_root / f"{folder.name}.lock"):
            if not folder.is_dir():
                write_store(folder, fingerprint, files, RowEncoder(config, encoder, vocab_size), progress)
    try:
        store = SampleStore(folder, files)
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(
            f"the tokenized data in {folder} is damaged; delete that folder, and it is made again"
        ) from None
    _check(store.account, store.quarantine, config)
    return store


def split_store(store: SampleStore, val_fraction: float, seed: int = 0) -> tuple[StoreView, StoreView]:
    """Split into training and validation samples by a seeded hash of each sample's content.

    Raises:
        DataError: one side would be empty.
    """
    # The finalizer of splitmix64: flips half of the output bits for any flip of the input.
    mixed = store.digests ^ np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    held_out = (mixed ^ (mixed >> np.uint64(31))) < np.uint64(val_fraction * 2.0**64)
    if held_out.all() or not held_out.any():
        side = "training" if held_out.all() else "validation"
        raise DataError(
            f"data.val_fraction={val_fraction} of {len(store)} samples leaves none for {side};"
            " choose another fraction, or set data.val_path"
        )
    sides = [("train", ~held_out), ("val", held_out)]
    train, val = (
        StoreView(store, np.flatnonzero(chosen).astype(np.int32), f"{store.fingerprint}/{val_fraction}/{seed}/{side}")
        for side, chosen in sides
    )
    return train, val


def _fingerprint(files: list[Path], config: DataConfig, encoder: ChatEncoder | None, vocab_size: int) -> str:
    """Hash everything that decides what is stored; the encoder's fingerprint covers tokenizer and template."""
    parts: list[Any] = [STORE_VERSION, config.format, config.max_seq_len, vocab_size]
    parts.append(encoder.fingerprint if encoder else None)
    for file in files:
        try:
            with file.open("rb") as handle:
                parts.append([file.name, hashlib.file_digest(handle, "sha256").hexdigest()])
        except OSError as error:
            raise DataError(f"data file '{file}' cannot be read: {error.strerror}") from error
    return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()


def _check(account: Account, quarantine: list[dict[str, Any]], config: DataConfig) -> None:
    """Raise DataError where more rows are bad than the configuration lets pass, or no row is left."""
    if quarantine and config.strict:
        raise strict_stop(quarantine[0]["file"], quarantine[0]["line"], quarantine[0]["reason"])
    bad = [f"{row['file']}:{row['line']}: {row['reason']}" for row in quarantine[:3]]
    if account.quarantined > max(config.max_bad_ratio * account.read, BAD_ROWS_ALLOWED):
        raise DataError(
            f"{account.quarantined} of {account.read} rows cannot be used: {'; '.join(bad)}."
            f" Fix them, or raise data.max_bad_ratio={config.max_bad_ratio}"
        )
    if not account.accepted:
        reasons = list(bad)
        if account.too_long:
            reasons.append(f"{account.too_long} have more than data.max_seq_len={config.max_seq_len} tokens")
        raise DataError(f"none of the {account.read} rows can be used: {'; '.join(reasons)}")
