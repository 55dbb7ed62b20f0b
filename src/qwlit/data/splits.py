"""The training and the validation samples that the settings name."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwlit.core.errors import ConfigError
from qwlit.data.batches import Samples
from qwlit.data.chat import ChatEncoder
from qwlit.data.config import DataConfig
from qwlit.data.store import SampleStore, build_store, split_store


@dataclass(frozen=True)
class DataSplit:
    """What there is to train and to validate on."""

    train: Samples
    validation: Samples | None
    stores: tuple[SampleStore, ...]
    """The stores behind them: one a data file set."""

    @property
    def totals(self) -> dict[str, int]:
        """Rows read and what became of them: read = accepted + too_long + quarantined."""
        accounts = [asdict(store.account) for store in self.stores]
        return {name: sum(account[name] for account in accounts) for name in accounts[0]}

    def describe(self) -> str:
        """Say in a line what there is."""
        tokens, supervised = int(self.train.lengths.sum()), int(self.train.num_supervised.sum())
        validation = f"{len(self.validation):,} to validate" if self.validation is not None else "no validation set"
        totals = self.totals
        rejected = [
            f"{totals[name]:,} {name.replace('_', ' ')}" for name in ("too_long", "quarantined") if totals[name]
        ]
        return (
            f"{len(self.train):,} samples, {tokens:,} tokens, {supervised / tokens:.0%} supervised; {validation}"
            + "".join(f"; {text}" for text in rejected)
        )

    @property
    def quarantine(self) -> list[dict[str, Any]]:
        return [row for store in self.stores for row in store.quarantine]

    @property
    def fingerprint(self) -> str:
        return "+".join(store.fingerprint[:16] for store in self.stores)


def load_data(
    config: DataConfig,
    *,
    encoder: ChatEncoder | None,
    vocab_size: int,
    cache_root: Path,
    progress: Callable[[int], None] | None = None,
) -> DataSplit:
    """Tokenize what is not yet tokenized, and split.

    Raises:
        ConfigError, DataError: see `build_store` and `split_store`.
    """
    if config.path is None:
        raise ConfigError("data.path is not set; give a .jsonl or .json file, or data=demo")

    def build(path: str) -> SampleStore:
        return build_store(
            path, config, encoder=encoder, vocab_size=vocab_size, cache_root=cache_root, progress=progress
        )

    store = build(config.path)
    if config.val_path is not None:
        validation = build(config.val_path)
        return DataSplit(store, validation, (store, validation))
    if config.val_fraction > 0:
        train, held_out = split_store(store, config.val_fraction)
        return DataSplit(train, held_out, (store,))
    return DataSplit(store, None, (store,))
