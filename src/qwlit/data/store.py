"""Store tokenized samples in arrays on disk, in a folder named by a fingerprint of everything that decides them.

Every row is exactly one of: accepted, too long, quarantined. N samples of T tokens each.
"""

import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qwlit.core.disk import disk_line
from qwlit.core.errors import DataError, one_line
from qwlit.core.files import locked
from qwlit.data.blocks import Damage
from qwlit.data.config import DataConfig
from qwlit.data.encoded_batch import RowCounts
from qwlit.data.encoding import RowEncoder
from qwlit.data.hub import HubData
from qwlit.data.samples import Ids
from qwlit.data.sources import Source, find_sources
from qwlit.data.store_folder import (
    ENDS,
    MASK_BIT,
    QUARANTINE,
    TOKENS,
    TOKENS_DTYPE,
    StoreFolder,
    array_file,
    marked_damage,
    store_folder,
)
from qwlit.data.store_writer import ProgressCallback, store_fingerprint, write_store

# This many bad rows never stop a run; otherwise one typo would stop a run on a small data set.
BAD_ROWS_ALLOWED = 3
DigestOf = Literal["samples", "tokens", "rows"]
REASONS_NAMED, LONGEST_NAMED = 3, 250


class DamagedStore(DataError):
    """A store is not what was written."""

    reason = ""
    """The folder, the file, and what is wrong with it."""


class SampleStore:
    """A finished store, open for reading. Tokens are read from the disk, and verified, when a sample is read.

    Lengths and places of the samples are in memory, 16 bytes per sample.
    """

    rebuilt: str | None = None
    """Why this process has built the store again; None if it was good or new."""

    def __init__(self, folder: Path, path: str, sources: list[Source]) -> None:
        """Open `folder`. `path` is the setting, and `sources` are the files that it names now.

        Raises:
            DamagedStore: the folder is damaged; see `StoreFolder`.
        """
        self.folder, self._sources = folder, sources
        self.path = path
        try:
            self._folder = StoreFolder(folder)
            self._lengths: NDArray[np.int32] = self._folder.column("lengths")
            self._num_supervised: NDArray[np.int32] = self._folder.column("num_supervised")
            self._ends: NDArray[np.int64] = self._folder.column(ENDS)
            self._tokens = self._folder.files[array_file(TOKENS)]
        except Damage as damage:
            raise self._damaged(damage, "run the same command again") from None
        facts = self._folder.facts
        self.fingerprint: str = facts["fingerprint"]
        self.row_counts = RowCounts(**facts["account"])
        self.remarks: Counter[str] = Counter(facts["remarks"])
        self.stopped_early: bool = facts["stopped_early"]
        """Whether `data.max_samples` left rows unread."""

    def __reduce__(self) -> tuple[type["SampleStore"], tuple[Path, str, list[Source]]]:
        # Pickle only the paths: a worker process then opens and verifies the files itself.
        return SampleStore, (self.folder, self.path, self._sources)

    def __len__(self) -> int:
        return len(self._lengths)

    def lengths(self, ids: Ids) -> NDArray[np.int32]:
        """See `Samples.lengths`."""
        return self._lengths.take(ids)

    def num_supervised(self, ids: Ids) -> NDArray[np.int32]:
        """See `Samples.num_supervised`."""
        return self._num_supervised.take(ids)

    def digests(self, ids: Ids | slice, of: DigestOf = "samples") -> NDArray[np.uint64]:
        """Return a hash of each sample: of tokens and mask, of tokens alone, or one that all samples of a row share."""
        column = {"samples": "digests", "tokens": "token_digests", "rows": "row_digests"}[of]
        chosen: NDArray[np.uint64] = self._column(column)[ids]
        return chosen

    def read(self, ids: Ids) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """See `Samples.read`."""
        ends, lengths = self._ends.take(ids), self._lengths.take(ids)
        size = np.dtype(TOKENS_DTYPE).itemsize
        try:
            data = self._tokens.read((ends - lengths) * size, ends * size)
        except Damage as damage:
            raise self._marked(damage) from None
        masked = np.frombuffer(data, TOKENS_DTYPE)
        return (masked & (2**MASK_BIT - 1)).view(np.int32), (masked >> MASK_BIT).astype(np.uint8)

    def source_digests(self) -> list[tuple[Source, str]]:
        """Return each file or data set with the hash of its content."""
        return [(source, source.digest(self.folder.parent)) for source in self._sources]

    def origin(self, index: int) -> str:
        """See `Samples.origin`."""
        sources, lines = self._origins
        return f"{self._sources[sources[index]]}:{lines[index]}"

    @cached_property
    def _origins(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        return self._column("sources"), self._column("lines")

    def _column(self, name: str) -> NDArray[Any]:
        try:
            return self._folder.column(name)
        except Damage as damage:
            raise self._marked(damage) from None

    def quarantine(self) -> Iterator[dict[str, Any]]:
        """Yield every quarantined row: file, line, reason, sha256."""
        cut = b""
        try:
            for block in self._folder.files[QUARANTINE].blocks():
                *lines, cut = (cut + block).split(b"\n")
                for line in lines:
                    row = json.loads(line)
                    yield {"file": str(self._sources[row.pop("source")]), **row}
        except Damage as damage:
            raise self._marked(damage) from None

    def _marked(self, damage: Damage) -> DamagedStore:
        """Return the error, after marking the folder, so that the next start builds the store again."""
        again = "run the same command again"
        is_marked = self._folder.mark_damaged(str(damage))
        return self._damaged(damage, again if is_marked else f"delete that folder and {again}")

    def _damaged(self, damage: Damage, remedy: str) -> DamagedStore:
        reason = one_line(f"{self.folder}: {damage}", LONGEST_NAMED)
        error = DamagedStore(
            f"the tokenized data of '{self.path}' are damaged ({reason}); {remedy}, and qwlit tokenizes them again"
        )
        error.reason = reason
        return error


def build_store(
    path: str,
    encoder: RowEncoder,
    *,
    cache_root: Path,
    progress: ProgressCallback | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> SampleStore:
    """Return the store of the rows in `path`; build it if it does not exist or is damaged.

    If several processes start together, one builds it and the others wait. A killed process leaves no folder that
    looks finished.

    Args:
        encoder: encodes rows as samples.
        progress: called after each batch of rows.
        say: called with a line if another process is building the store, or if the store is damaged.

    Raises:
        DataError: a file cannot be read, a row stops the run (data.strict, data.too_long=error), the cache cannot
            be written, or (NeedsTokenizer) there is text and no tokenizer.
    """
    sources = find_sources(path)
    damage = None
    try:
        fingerprint = store_fingerprint(sources, encoder, cache_root)
        folder = store_folder(cache_root, fingerprint)
        with suppress(DamagedStore):
            if store := _open_finished(folder, path, sources):
                return store

        def waiting(holder: str) -> None:
            say(f"waiting for {holder} that is tokenizing the same data")

        with locked(cache_root / f"{folder.name}.lock", waiting=waiting):
            try:
                # Check again under the lock: another process may have built the store while we waited for it.
                if store := _open_finished(folder, path, sources):
                    return store
            except DamagedStore as damaged:
                damage = damaged.reason
                say(f"the tokenized data of '{path}' are damaged ({damage}): qwlit tokenizes them again")
            write_store(folder, fingerprint, sources, encoder, progress)
    except OSError as error:
        line = disk_line(error)
        if error.filename is None or Path(os.fsdecode(error.filename)).is_relative_to(cache_root):
            line = f"the tokenized data cannot be written to {cache_root}: {line}, or set run.root"
        raise DataError(line) from None
    store = SampleStore(folder, path, sources)
    store.rebuilt = damage
    return store


def _open_finished(folder: Path, path: str, sources: list[Source]) -> SampleStore | None:
    """Return the store if there is one.

    Raises:
        DamagedStore: it is damaged.
    """
    if not os.path.lexists(folder):
        return None
    store = SampleStore(folder, path, sources)
    # Every training copies the quarantine into its run folder: damage must be found before.
    deque(store.quarantine(), maxlen=0)
    return store


def is_tokenized(path: str, encoder: RowEncoder, *, cache_root: Path) -> bool:
    """Return whether the store exists already, without reading any data."""
    sources = find_sources(path)
    if not all(not isinstance(source, HubData) and source.known_digest(cache_root) for source in sources):
        return False
    folder = store_folder(cache_root, store_fingerprint(sources, encoder, cache_root))
    return folder.is_dir() and marked_damage(folder) is None


@dataclass(frozen=True)
class QuarantineReason:
    """One reason for which rows were quarantined."""

    text: str
    num_rows: int
    first: dict[str, Any]
    """The first of these rows: file, line, reason, sha256."""

    def __str__(self) -> str:
        more = f" and {self.num_rows - 1:,} more" if self.num_rows > 1 else ""
        return f"{self.first['file']}:{self.first['line']}{more}: {one_line(self.text, LONGEST_NAMED)}"


def quarantine_reasons(stores: Iterable[SampleStore]) -> list[QuarantineReason]:
    """Return the reasons for which rows were quarantined, the most frequent first."""
    first: dict[str, dict[str, Any]] = {}
    counts: Counter[str] = Counter()
    for store in stores:
        for row in store.quarantine():
            first.setdefault(row["reason"], row)
            counts[row["reason"]] += 1
    return [QuarantineReason(text, num_rows, first[text]) for text, num_rows in counts.most_common()]


def check_row_counts(store: SampleStore, config: DataConfig) -> None:
    """Refuse a store with too many bad rows or without samples.

    Raises:
        DataError: more rows are bad than the configuration allows (with `strict`: one), or no sample is left.
    """
    row_counts = store.row_counts
    if row_counts.quarantined and config.strict:
        bad = next(store.quarantine())
        raise DataError(f"{bad['file']}:{bad['line']}: {bad['reason']} (data.strict=true stops at the first bad row)")
    too_many = row_counts.quarantined > max(config.max_bad_ratio * row_counts.read, BAD_ROWS_ALLOWED)
    if row_counts.accepted and not too_many:
        return
    # Only for a refusal: the quarantine may be long.
    reasons = [str(reason) for reason in quarantine_reasons([store])[:REASONS_NAMED]]
    if too_many:
        limit = f", or set a higher limit than data.max_bad_ratio={config.max_bad_ratio:g}"
        named = "; ".join(reasons)
        stop = "" if named.endswith((".", "?")) else "."
        raise DataError(
            f"{row_counts.quarantined} of {row_counts.read} rows cannot be used: {named}{stop}"
            f" All are in {store.folder / QUARANTINE}. Fix them{limit if row_counts.accepted else ''}"
        )
    if row_counts.too_long:
        reasons.append(f"{row_counts.too_long} have more than data.max_seq_len={config.max_seq_len} tokens")
    raise DataError(f"none of the {row_counts.read} rows can be used: {'; '.join(reasons)}")
