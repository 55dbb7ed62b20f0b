"""The settings under `data.`"""

from typing import Literal

from qwlit.core.schema import Flag, NonNegativeInt, PositiveInt, Probability, Ratio, config_dataclass

RowFormat = Literal["auto", "messages", "tokenized"]


@config_dataclass
class DataConfig:
    """Which rows to train on and how they become tokens."""

    path: str | None = None
    """A .jsonl or .json file, or a folder of them; `qwlit:demo/train.jsonl` is the bundled corpus."""
    val_path: str | None = None
    """Rows to validate on, read like `path`. null: see `val_fraction`."""
    val_fraction: Probability = 0.0
    """Share of rows (0 to 1) held out where there is no `val_path`. A hash of the row's tokens chooses, so that a row
    stays on its side when others come or go, and copies of it never stand on both sides."""
    format: RowFormat = "auto"
    """What a row is. `auto` tells by its keys; a set format quarantines rows of any other."""
    template: Literal["auto", "qwen2", "qwen2_5", "qwen3"] = "auto"
    """How a conversation is written down. `auto` recognises the tokenizer's own template and refuses an unknown one."""
    packing: Flag = True
    """Lay samples end to end, each seeing only itself: nothing is padded. False gives right-padded rows."""
    max_seq_len: PositiveInt = 2048
    """Tokens a sample may have; longer ones are dropped and counted. 2048 holds most conversations."""
    max_bad_ratio: Ratio = 0.01
    """Share of unusable rows (0 to 1) above which the run is refused; up to three are always let pass."""
    strict: Flag = False
    """Stop at the first unusable row instead of putting it aside."""
    exact_match: NonNegativeInt = 0
    """Validation rows answered greedily at the end and compared exactly. 0: none, for prose has many good answers."""
