"""The settings under `data.`"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from qwlit.core.schema import Flag, NonNegativeInt, PositiveFloat, Probability, Ratio, TwoOrMore, config_dataclass

RowFormat = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "tokenized"]
TemplateName = Literal["auto", "qwen2", "qwen2_5", "qwen2_5_base", "qwen3", "qwen3_2507"]
LossOn = Literal["assistant", "last_assistant", "all"]
Thinking = Literal["keep", "drop", "mask_empty"]
TooLong = Literal["auto", "drop", "truncate", "split", "error"]


@config_dataclass
class DataPart:
    """One item of a list of data."""

    path: str
    """As `data.path`."""
    weight: PositiveFloat | None = None
    """Share of training samples drawn from here, relative to the other weights. All parts have one, or none."""


def _as_parts(value: Any) -> Any:
    """Turn a list's items into parts; a plain path is one without a weight."""
    if not isinstance(value, list | tuple):
        return value
    if not value:
        raise ValueError("the list is empty")
    return tuple(item if isinstance(item, DataPart) else _as_part(item) for item in value)


def _as_part(item: Any) -> DataPart:
    if isinstance(item, str):
        return DataPart(path=item)
    if not isinstance(item, dict) or not isinstance(item.get("path"), str):
        raise ValueError(f"{_typed(item)} is neither a path nor {{path:…,weight:…}}")
    if unknown := item.keys() - {"path", "weight"}:
        raise ValueError(f"'{min(unknown)}' is no setting of a part; write {{path:…,weight:…}}")
    weight = item.get("weight")
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if weight is not None and not (is_number and 0 < weight < float("inf")):
        raise ValueError(f"weight {weight} of {item['path']} must be a number above 0")
    return DataPart(path=item["path"], weight=weight)


def _typed(item: Any) -> str:
    """Return the item as one types it."""
    if isinstance(item, dict):
        return "{" + ",".join(f"{key}:{_typed(value)}" for key, value in item.items()) + "}"
    return "[" + ",".join(map(_typed, item)) + "]" if isinstance(item, list) else str(item)


DataPath = Annotated[str | tuple[DataPart, ...] | None, BeforeValidator(_as_parts)]


@config_dataclass
class DataConfig:
    """Which rows to train on and how they become tokens."""

    path: DataPath = None
    """A file (.jsonl .json .parquet .csv .txt, the text ones also .gz), a folder of them or of `save_to_disk`, a glob,
    hf:ORG/NAME[:SPLIT], or a list: [a.jsonl,b.parquet] joins, [{path:a.jsonl,weight:3},{path:b.csv,weight:1}] mixes by
    weight. `qwlit:demo/train.jsonl` is the bundled corpus."""
    val_path: DataPath = None
    """Rows to validate on, read like `path`. null: see `val_fraction`."""
    val_fraction: Probability = 0.0
    """Share of rows (0 to 1) held out where there is no `val_path`. A hash of the row's tokens chooses, so that a row
    stays on its side when others come or go, and copies of it never stand on both sides. Of .txt files samples are
    held out, not files."""
    format: RowFormat = "auto"
    """What a row is. `auto` tells by its keys; a set format reads only its own keys."""
    template: TemplateName = "auto"
    """How a conversation is written down. `auto` recognises the tokenizer's own template, with whatever default system
    text, and refuses an unknown one."""
    loss_on: LossOn = "assistant"
    """What is learnt of a conversation: every answer with its end of turn, only the last answer, or every token
    but the turns that a row marks as not supervised.
    Plain text is learnt whole; tokenized rows bring their own mask (alone, with `all`)."""
    thinking: Thinking = "mask_empty"
    """Reasoning in answers. `mask_empty` learns it where there is some; the empty block that the template puts before
    an answer without is read, not learnt, as at inference it stands in the prompt. `keep` learns the empty block too:
    the model then leaves thinking out by itself. `drop` takes all reasoning out."""
    packing: Flag = True
    """Lay samples end to end, each seeing only itself: nothing is padded. False gives right-padded rows."""
    max_seq_len: TwoOrMore = 2048
    """Tokens a sample may have; see `too_long`. 2048 holds most conversations."""
    too_long: TooLong = "auto"
    """What becomes of longer rows: left out and counted, cut at the end, cut into several samples, or the run is
    refused. `auto` splits plain text and drops the rest."""
    drop_duplicates: Flag = False
    """Train once on samples with the same tokens and loss mask. They are counted in any case."""
    max_bad_ratio: Ratio = 0.01
    """Share of unusable rows (0 to 1) above which the run is refused; up to three are always let pass."""
    strict: Flag = False
    """Stop at the first unusable row instead of putting it aside."""
    exact_match: NonNegativeInt = 0
    """Validation rows answered greedily at the end and compared exactly. 0: none, for prose has many good answers."""


def parts_of(path: DataPath) -> tuple[DataPart, ...]:
    """Return the parts of a setting: a single path is one."""
    if path is None:
        return ()
    return (DataPart(path=path),) if isinstance(path, str) else path
