"""The training and the validation samples that the settings name, and in which shares training draws them."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwlit.core.errors import ConfigError, DataError
from qwlit.data.config import DataConfig, DataPart, parts_of
from qwlit.data.encoding import RowEncoder
from qwlit.data.order import Order
from qwlit.data.samples import CHUNK, Chosen, Samples, count_tokens, join
from qwlit.data.sources import find_sources
from qwlit.data.store import DigestOf, SampleStore, build_store, check_account
from qwlit.data.store_writer import Progress
from qwlit.data.unread import OTHER_KEYS


@dataclass(frozen=True)
class DataSplit:
    """What there is to train and to validate on."""

    train: Samples
    validation: Samples | None
    parts: tuple[tuple[DataPart, int], ...]
    """The training data as set, each with its number of training samples."""
    stores: tuple[SampleStore, ...]
    """The stores behind them: one a part."""
    val_fraction: float
    num_copies_across: int
    """Training samples with the tokens and loss mask of one in an earlier part."""
    num_leaked: int
    """Validation samples whose tokens are also there to train on."""

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
        """Rows read and what became of them: read = accepted + too_long + quarantined."""
        accounts = [asdict(store.account) for store in self.stores]
        totals = {name: sum(account[name] for account in accounts) for name in accounts[0]}
        return totals | {"duplicates": totals["duplicates"] + self.num_copies_across}

    def describe(self) -> str:
        """Say in a line what there is."""
        tokens, supervised = count_tokens(self.train)
        validation = f"{len(self.validation):,} to validate" if self.validation is not None else "no validation set"
        totals = self.totals
        named = ("too_long", "quarantined", "truncated", "split", "duplicates")
        special = [f"{totals[name]:,} {name.replace('_', ' ')}" for name in named if totals[name]]
        share = f"{len(self.train):,} samples, {tokens:,} tokens, {supervised / tokens:.0%} supervised"
        return "; ".join((share, validation, *special))

    def describe_shares(self, seed: int) -> list[str]:
        """Say for each weighted part how many of its samples an epoch has."""
        if self.parts[0][0].weight is None:
            return []
        return [
            f"{part.path}: {quota:,} of {size:,} samples an epoch ({quota / size:.2g} times)"
            for (part, size), quota in zip(self.parts, self.order(seed).quotas, strict=True)
        ]

    @property
    def remarks(self) -> list[str]:
        """What a careful reader of the data would remark on."""
        counts: Counter[str] = sum((store.remarks for store in self.stores), Counter())
        # A row with several of the keys that are not named is counted for each.
        found = [f"{'up to ' * (text == OTHER_KEYS)}{number:,} rows have {text}" for text, number in counts.items()]
        if self.num_leaked:
            found.append(f"{self.num_leaked:,} validation samples are also trained on: val/loss will flatter")
        return found

    def quarantine(self) -> Iterator[dict[str, Any]]:
        for store in self.stores:
            yield from store.quarantine()

    @property
    def fingerprint(self) -> str:
        """Name all that decides which samples there are and how often each is met."""
        parts = [store.fingerprint[:16] for store in self.stores]
        weights = [f"{part.weight:g}" for part, _ in self.parts if part.weight is not None]
        held_out = [f"/{self.val_fraction:g}"] if self.val_fraction else []
        return "+".join(parts) + ("*" + ",".join(weights) if weights else "") + "".join(held_out)


def open_stores(
    config: DataConfig,
    encoder: RowEncoder,
    *,
    cache_root: Path,
    progress: Progress | None = None,
    waiting: Callable[[], None] | None = None,
) -> tuple[list[SampleStore], list[SampleStore]]:
    """Return the stores of `data.path` and of `data.val_path`, one a part, tokenizing what is not yet tokenized.

    Raises:
        ConfigError: only some parts have weights, or parts to validate on do.
        DataError: see `build_store`.
    """
    parts = parts_of(config.path)
    if not parts:
        raise ConfigError("data.path is not set; give a file, a folder or hf:ORG/NAME, or choose data=demo")
    if len({part.weight is None for part in parts}) > 1:
        raise ConfigError("data.path: give every part a weight, or none")
    if any(part.weight is not None for part in parts_of(config.val_path)):
        raise ConfigError("data.val_path takes no weights: every row is validated once")

    for part in (*parts, *parts_of(config.val_path)):
        find_sources(part.path)  # a wrong name should not be found out after hours of tokenizing another part

    def build(part: DataPart) -> SampleStore:
        return build_store(part.path, encoder, cache_root=cache_root, progress=progress, waiting=waiting)

    return [build(part) for part in parts], [build(part) for part in parts_of(config.val_path)]


def split_data(config: DataConfig, training: list[SampleStore], validation: list[SampleStore]) -> DataSplit:
    """Judge the stores, and hold out what is not for training.

    Raises:
        DataError: too many bad rows, or a side without samples.
    """
    for store in (*training, *validation):
        check_account(store, config)
    first = [_without_copies(store, training[:number]) for number, store in enumerate(training)]
    num_copies = sum(_num_copies(store, ids) for store, ids in zip(training, first, strict=True))
    kept: list[Samples] = [*training]
    if config.drop_duplicates and num_copies:
        kept = [Chosen(store, ids) for store, ids in zip(training, first, strict=True)]
    held_out: list[Samples] = [*validation]
    if config.val_fraction > 0:
        dropped = first if config.drop_duplicates else [None] * len(training)
        sides = [split_store(s, config.val_fraction, ids) for s, ids in zip(training, dropped, strict=True)]
        kept, held_out = [train for train, _ in sides], [val for _, val in sides]
        distinct = sum(len(np.unique(s.digests(slice(None), "rows"))) for s in training)
        for side, parts in (("training", kept), ("validation", held_out)):
            if not any(len(part) for part in parts):
                samples = f"{sum(map(len, training))} samples ({distinct} different ones; copies stay on one side)"
                raise DataError(
                    f"data.val_fraction={config.val_fraction} of {samples} leaves none for {side};"
                    " choose another fraction, or set data.val_path"
                )
    return DataSplit(
        train=join(kept),
        validation=join(held_out) if held_out else None,
        parts=tuple((part, len(samples)) for part, samples in zip(parts_of(config.path), kept, strict=True)),
        stores=(*training, *validation),
        val_fraction=config.val_fraction,
        num_copies_across=num_copies,
        num_leaked=sum(len(store) - len(_without_copies(store, training, "tokens")) for store in validation),
    )


def load_data(
    config: DataConfig, encoder: RowEncoder, *, cache_root: Path, progress: Progress | None = None
) -> DataSplit:
    """Tokenize what is not yet tokenized, and split; see `open_stores` and `split_data`."""
    return split_data(config, *open_stores(config, encoder, cache_root=cache_root, progress=progress))


def _without_copies(store: SampleStore, earlier: list[SampleStore], of: DigestOf = "samples") -> NDArray[np.int32]:
    """Return the samples that no earlier part has; `of` the tokens, those whose tokens none has."""
    ids = np.arange(len(store), dtype=np.int32)
    for other in earlier:
        ids = ids[~np.isin(store.digests(ids, of), other.digests(slice(None), of))]
    return ids


def _num_copies(store: SampleStore, without: NDArray[np.int32]) -> int:
    """Return how many different samples are missing from `without`: a part's own copies are in its account."""
    missing = np.setdiff1d(np.arange(len(store), dtype=np.int32), without, assume_unique=True)
    return len(np.unique(store.digests(missing)))


def split_store(
    store: SampleStore, val_fraction: float, among: NDArray[np.int32] | None = None
) -> tuple[Chosen, Chosen]:
    """Split the samples (or those `among` them) into training and validation by a hash of each row's tokens."""
    sides: tuple[list[NDArray[np.int32]], list[NDArray[np.int32]]] = ([], [])
    for start in range(0, len(store), CHUNK):
        ids = np.arange(start, min(start + CHUNK, len(store)), dtype=np.int32)
        if among is not None:
            ids = among[(among >= start) & (among < start + CHUNK)]
        held_out = _mix(store.digests(ids, "rows")) < np.uint64(val_fraction * 2.0**64)
        sides[0].append(ids[~held_out])
        sides[1].append(ids[held_out])
    train, val = (Chosen(store, np.concatenate(side)) for side in sides)
    return train, val


def _mix(digests: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64: any flip of the input flips half of the output bits."""
    mixed = digests
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
