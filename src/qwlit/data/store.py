"""Store tokenized samples in memory-mapped arrays, in a folder named by a fingerprint of everything that decides them.

Every row is exactly one of: accepted, too long, quarantined. N samples of T tokens each.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qwlit.core.errors import DataError, one_line
from qwlit.core.files import locked
from qwlit.data.config import DataConfig
from qwlit.data.encoded_batch import RowCounts
from qwlit.data.encoding import RowEncoder
from qwlit.data.hub import HubData
from qwlit.data.sources import Source, find_sources
from qwlit.data.store_writer import ARRAYS, QUARANTINE, ProgressCallback, store_fingerprint, write_store

# This many bad rows never stop a run; otherwise one typo would stop a run on a small data set.
BAD_ROWS_ALLOWED = 3
DigestOf = Literal["samples", "tokens", "rows"]
REASONS_NAMED, LONGEST_NAMED = 3, 250


class SampleStore:
    """A finished store, open for reading. The arrays stay on disk until a sample is read."""

    def __init__(self, folder: Path, path: str, sources: list[Source]) -> None:
        """Open `folder`. `path` is the setting, and `sources` are the files that it names now."""
        self.folder, self._sources = folder, sources
        self.path = path
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.fingerprint: str = meta["fingerprint"]
        self.row_counts = RowCounts(**meta["account"])
        self.remarks: Counter[str] = Counter(meta["remarks"])
        # Stores that an earlier version wrote do not have it.
        self.stopped_early: bool = meta.get("stopped_early", False)
        """Whether `data.max_samples` left rows unread."""
        (folder / QUARANTINE).stat()  # a missing file must be an error now, not when someone reads it
        # As plain arrays: numpy's memmap class makes each of the many small slices slower.
        self._arrays: dict[str, NDArray[Any]] = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in ARRAYS
        }

    def __reduce__(self) -> tuple[type["SampleStore"], tuple[Path, str, list[Source]]]:
        # Pickle only the paths: a worker process then maps the files itself, and no array is copied.
        return SampleStore, (self.folder, self.path, self._sources)

    def __len__(self) -> int:
        return len(self._arrays["lengths"])

    def lengths(self, ids: NDArray[np.integer[Any]]) -> NDArray[np.int32]:
        """See `Samples.lengths`."""
        return self._arrays["lengths"].take(ids)

    def num_supervised(self, ids: NDArray[np.integer[Any]]) -> NDArray[np.int32]:
        """See `Samples.num_supervised`."""
        return self._arrays["num_supervised"].take(ids)

    def digests(self, ids: NDArray[np.integer[Any]] | slice, of: DigestOf = "samples") -> NDArray[np.uint64]:
        """Return a hash of each sample: of tokens and mask, of tokens alone, or one that all samples of a row share."""
        array = {"samples": "digests", "tokens": "token_digests", "rows": "row_digests"}[of]
        chosen: NDArray[np.uint64] = self._arrays[array][ids]
        return chosen

    def sample(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """See `Samples.sample`."""
        end = int(self._arrays["ends"][index])
        start = end - int(self._arrays["lengths"][index])
        return self._arrays["tokens"][start:end], self._arrays["mask"][start:end]

    def origin(self, index: int) -> str:
        """See `Samples.origin`."""
        return f"{self._sources[self._arrays['sources'][index]]}:{self._arrays['lines'][index]}"

    def quarantine(self) -> Iterator[dict[str, Any]]:
        """Yield every quarantined row: file, line, reason, sha256."""
        with (self.folder / QUARANTINE).open(encoding="utf-8") as handle:
            for line in handle:
                row = json.loads(line)
                yield {"file": str(self._sources[row.pop("source")]), **row}


def build_store(
    path: str,
    encoder: RowEncoder,
    *,
    cache_root: Path,
    progress: ProgressCallback | None = None,
    waiting: Callable[[str], None] | None = None,
) -> SampleStore:
    """Return the store of the rows in `path`; build it if it does not exist.

    If several processes start together, one builds it and the others wait. A killed process leaves no folder that
    looks finished.

    Args:
        encoder: encodes rows as samples.
        progress: called after each batch of rows.
        waiting: called with the name of the process, if another one is building the store.

    Raises:
        DataError: a file cannot be read, a row stops the run (data.strict, data.too_long=error), the cache cannot
            be written, or (NeedsTokenizer) there is text and no tokenizer.
    """
    sources = find_sources(path)
    try:
        fingerprint = store_fingerprint(sources, encoder, cache_root)
        folder = cache_root / fingerprint[:32]
        if not folder.is_dir():
            # Check again under the lock: another process may have built the store while we waited for it.
            with locked(cache_root / f"{folder.name}.lock", waiting=waiting):
                if not folder.is_dir():
                    write_store(folder, fingerprint, sources, encoder, progress)
    except OSError as error:
        raise DataError(
            f"the tokenized data cannot be written to {cache_root}: {error.strerror or error};"
            " free disk space, or set run.root"
        ) from None
    try:
        return SampleStore(folder, path, sources)
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        raise DataError(
            f"the tokenized data in {folder} is damaged; delete that folder, and qwlit builds it again"
        ) from None


def is_tokenized(path: str, encoder: RowEncoder, *, cache_root: Path) -> bool:
    """Return whether the store exists already, without reading any data."""
    sources = find_sources(path)
    if not all(not isinstance(source, HubData) and source.known_digest(cache_root) for source in sources):
        return False
    return (cache_root / store_fingerprint(sources, encoder, cache_root)[:32]).is_dir()


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
