"""Split the data into training and validation samples, and define the share of each part in training."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwlit.core.errors import ConfigError, DataError
from qwlit.data.config import DataConfig, DataPart, check_weights, parts_of, validation_sets
from qwlit.data.encoded_batch import RowCounts
from qwlit.data.encoding import RowEncoder
from qwlit.data.order import Order
from qwlit.data.samples import CHUNK, Samples, SampleSubset, concat, count_tokens
from qwlit.data.sources import find_sources
from qwlit.data.store import DigestOf, SampleStore, build_store, check_row_counts
from qwlit.data.store_writer import ProgressCallback
from qwlit.data.unread import OTHER_KEYS

FILES_LISTED = 100
"""A manifest names the hashes of so many files."""


@dataclass(frozen=True)
class DataSplit:
    """The samples for training and for validation."""

    train: Samples
    validation_sets: dict[str, Samples]
    """The validation samples by the name of their set, "" for a set without one; empty without validation."""
    parts: tuple[tuple[DataPart, int], ...]
    """The parts of `data.path`, each with its number of training samples."""
    stores: tuple[SampleStore, ...]
    """One store for each part of `data.path`, then one for each part of `data.val_path`."""
    val_fraction: float
    contents: dict[str, list[str]]
    """The fingerprints of the stores by setting: data.path, then data.val_path, or data.val_path.NAME of each set."""
    num_duplicates_across_parts: int
    """Different training samples that also occur, with the same tokens and loss mask, in an earlier part."""
    num_leaked: int
    """Validation samples whose tokens are also in the training data."""

    def file_digests(self) -> dict[str, str]:
        """Return the SHA-256 of each file or data set by its name; a name used twice becomes the whole path.

        Files beyond FILES_LISTED share one hash.
        """
        found: dict[str, str] = {}
        for source, digest in (pair for store in self.stores for pair in store.source_digests()):
            found[source.name if found.get(source.name, digest) == digest else str(source)] = digest
        if len(found) <= FILES_LISTED:
            return found
        listed = sorted(found.items())
        rest = hashlib.sha256(repr(listed[FILES_LISTED:]).encode()).hexdigest()
        return dict(listed[:FILES_LISTED]) | {f"{len(listed) - FILES_LISTED} more": rest}

    @property
    def validation(self) -> Samples | None:
        """The samples of all validation sets; None without validation."""
        return concat([*self.validation_sets.values()]) if self.validation_sets else None

    def order(self, seed: int) -> Order:
        """Return the order in which training meets the samples.

        Raises:
            ConfigError: a part's weight is too small.
        """
        weights = [part.weight for part, _ in self.parts if part.weight is not None]
        if not weights:
            return Order.plain(seed, len(self.train))
        return Order.weighted(seed, [size for _, size in self.parts], weights)

    @property
    def totals(self) -> dict[str, int]:
        """Counts of rows over all stores: read = accepted + too_long + quarantined."""
        total = RowCounts(duplicates=self.num_duplicates_across_parts)
        for store in self.stores:
            total.add(store.row_counts)
        return asdict(total)

    def describe(self) -> str:
        """Return one line with the number of samples, tokens and special rows."""
        tokens, supervised = count_tokens(self.train)
        sets = ", ".join(f"{name} {len(samples):,}" for name, samples in self.validation_sets.items() if name)
        number = sum(map(len, self.validation_sets.values()))
        validation = f"{number:,} to validate{f' ({sets})' * bool(sets)}" if number else "no validation set"
        totals = self.totals
        named = ("too_long", "quarantined", "truncated", "split", "duplicates")
        special = [f"{totals[name]:,} {name.replace('_', ' ')}" for name in named if totals[name]]
        share = f"{len(self.train):,} samples, {tokens:,} tokens, {supervised / tokens:.0%} supervised"
        return "; ".join((share, validation, *special))

    def describe_shares(self, seed: int) -> list[str]:
        """Return one line for each weighted part: how many of its samples an epoch has."""
        if self.parts[0][0].weight is None:
            return []
        return [
            f"{part.path}: {quota:,} of {size:,} samples an epoch ({quota / size:.2g} times)"
            for (part, size), quota in zip(self.parts, self.order(seed).quotas, strict=True)
        ]

    @property
    def remarks(self) -> list[str]:
        """Remarks on the data, each with the number of rows."""
        counts: Counter[str] = sum((store.remarks for store in self.stores), Counter())
        # OTHER_KEYS counts a row once for each unnamed key, so its number is an upper limit.
        texts = [f"{'up to ' * (text == OTHER_KEYS)}{number:,} rows have {text}" for text, number in counts.items()]
        texts += dict.fromkeys(
            f"{store.path}: only the first {store.row_counts.read:,} rows are read, for data.max_samples={len(store):,}"
            for store in self.stores
            if store.stopped_early
        )
        texts += [
            f"{store.path}: the tokenized data were damaged ({store.rebuilt}) and are tokenized again"
            for store in self.stores
            if store.rebuilt
        ]
        if self.num_leaked:
            texts.append(
                f"{self.num_leaked:,} validation samples are also in the training data: val/loss will be too low"
            )
        return texts

    def quarantine(self) -> Iterator[dict[str, Any]]:
        """Yield all quarantined rows; see `SampleStore.quarantine`."""
        for store in self.stores:
            yield from store.quarantine()

    @property
    def fingerprint(self) -> str:
        """A name for everything that decides which samples training uses and how often."""
        parts = [_short(store) for store in self.stores]
        weights = [f"{part.weight:g}" for part, _ in self.parts if part.weight is not None]
        held_out = [f"/{self.val_fraction:g}"] if self.val_fraction else []
        return "+".join(parts) + ("*" + ",".join(weights) if weights else "") + "".join(held_out)


def open_stores(
    config: DataConfig,
    encoder: RowEncoder,
    *,
    cache_root: Path,
    progress: ProgressCallback | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[list[SampleStore], list[SampleStore]]:
    """Return the stores of `data.path` and of `data.val_path`, one per part. Tokenize parts that have no store yet.

    Raises:
        ConfigError: only some parts have weights, or a part of `data.val_path` has one.
        DataError: see `build_store`.
    """
    parts = parts_of(config.path)
    if not parts:
        raise ConfigError("data.path is not set; give a file, a folder or hf:ORG/NAME, or choose data=demo")
    check_weights(config)
    for part in (*parts, *parts_of(config.val_path)):
        find_sources(part.path)  # report a wrong path now, not after hours of tokenizing another part

    def build(part: DataPart) -> SampleStore:
        return build_store(part.path, encoder, cache_root=cache_root, progress=progress, say=say)

    return [build(part) for part in parts], [build(part) for part in parts_of(config.val_path)]


def split_data(config: DataConfig, training: list[SampleStore], validation: list[SampleStore]) -> DataSplit:
    """Check the stores, and hold out the validation samples.

    Raises:
        DataError: too many bad rows, or training or validation has no samples.
    """
    for store in (*training, *validation):
        check_row_counts(store, config)
    # Compare each part only with earlier parts, so that the first copy of a sample stays.
    distinct_ids = [_ids_without_copies(store, training[:index]) for index, store in enumerate(training)]
    num_copies = sum(_count_missing(store, ids) for store, ids in zip(training, distinct_ids, strict=True))
    kept: list[Samples] = [*training]
    if config.drop_duplicates and num_copies:
        kept = [SampleSubset(store, ids) for store, ids in zip(training, distinct_ids, strict=True)]
    stores = iter(validation)
    stores_of = {name: [next(stores) for _ in parts] for name, parts in validation_sets(config.val_path).items()}
    sets: dict[str, Samples] = {name: concat([*part]) for name, part in stores_of.items()}
    contents = {"data.path": [_short(store) for store in training]}
    for name, part in stores_of.items():
        contents[f"data.val_path.{name}" if name else "data.val_path"] = [_short(store) for store in part]
    if config.val_fraction > 0:
        candidates = distinct_ids if config.drop_duplicates else [None] * len(training)
        # Split each part separately: the mixture needs the number of training samples of each part.
        sides = [split_store(s, config.val_fraction, ids) for s, ids in zip(training, candidates, strict=True)]
        kept, held_out = [train for train, _ in sides], [val for _, val in sides]
        num_distinct = sum(len(np.unique(s.digests(slice(None), "rows"))) for s in training)
        for side, parts in (("training", kept), ("validation", held_out)):
            if not any(len(part) for part in parts):
                samples = f"{sum(map(len, training))} samples ({num_distinct} different ones; copies stay on one side)"
                raise DataError(
                    f"data.val_fraction={config.val_fraction} of {samples} leaves none for {side};"
                    " choose another fraction, or set data.val_path"
                )
        sets = {"": concat(held_out)}
    return DataSplit(
        train=concat(kept),
        validation_sets=sets,
        parts=tuple((part, len(samples)) for part, samples in zip(parts_of(config.path), kept, strict=True)),
        stores=(*training, *validation),
        val_fraction=config.val_fraction,
        contents=contents,
        num_duplicates_across_parts=num_copies,
        # Compare tokens alone: with another mask, the model has still seen the text.
        num_leaked=sum(len(store) - len(_ids_without_copies(store, training, "tokens")) for store in validation),
    )


def _short(store: SampleStore) -> str:
    return store.fingerprint[:16]


def _ids_without_copies(store: SampleStore, earlier: list[SampleStore], of: DigestOf = "samples") -> NDArray[np.int32]:
    """Return the ids of samples that no earlier part has. `of` selects what to compare: tokens and mask, or tokens."""
    ids = np.arange(len(store), dtype=np.int32)
    for other in earlier:
        ids = ids[~np.isin(store.digests(ids, of), other.digests(slice(None), of))]
    return ids


def _count_missing(store: SampleStore, kept_ids: NDArray[np.int32]) -> int:
    """Return how many different samples are not in `kept_ids`; copies within the part are in its own row counts."""
    missing = np.setdiff1d(np.arange(len(store), dtype=np.int32), kept_ids, assume_unique=True)
    return len(np.unique(store.digests(missing)))


def split_store(
    store: SampleStore, val_fraction: float, among: NDArray[np.int32] | None = None
) -> tuple[SampleSubset, SampleSubset]:
    """Split the samples (or only those with ids in `among`) into training and validation by a hash of the tokens."""
    ids = np.arange(len(store), dtype=np.int32) if among is None else among
    is_held_out = np.empty(len(ids), dtype=bool)
    digests = store.digests(ids, "rows")
    # In chunks, to limit memory.
    for start in range(0, len(ids), CHUNK):
        chunk = slice(start, start + CHUNK)
        # The digest is of tokens only and the same for all samples of a row, so copies and pieces stay on one side.
        # It depends on no other row, so a row keeps its side when the data changes.
        is_held_out[chunk] = _mix(digests[chunk]) < np.uint64(val_fraction * 2.0**64)
    return SampleSubset(store, ids[~is_held_out]), SampleSubset(store, ids[is_held_out])


def _mix(digests: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the finalizer of splitmix64: each input bit changes about half of the output bits."""
    mixed = digests
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
