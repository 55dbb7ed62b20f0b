"""The settings under `data.`"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator

from qwlit.core.errors import ConfigError
from qwlit.core.schema import (
    Flag,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    Ratio,
    TwoOrMore,
    config_dataclass,
    key_of,
)
from qwlit.data.templates import FAMILIES

RowFormat = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "tokenized"]
TemplateName = Annotated[str, key_of(FAMILIES, "auto")]
LossOn = Literal["assistant", "last_assistant", "all"]
Thinking = Literal["keep", "drop", "mask_empty"]
TooLong = Literal["auto", "drop", "truncate", "split", "error"]


@config_dataclass
class DataPart:
    """One entry of the list in `data.path`."""

    path: str
    """Same forms as `data.path`."""
    weight: PositiveFloat | None = None
    """Share of training samples from this part, relative to the other weights. Give all parts a weight, or no part."""


def _as_parts(value: Any) -> Any:
    """Convert the items of a list to parts; a plain path becomes a part without a weight."""
    if not isinstance(value, list | tuple):
        return value
    if not value:
        raise ValueError("the list is empty")
    return tuple(item if isinstance(item, DataPart) else _as_part(item) for item in value)


def _as_part(item: Any) -> DataPart:
    if isinstance(item, str):
        return DataPart(path=item)
    if not isinstance(item, dict) or not isinstance(item.get("path"), str):
        raise ValueError(f"{_as_typed(item)} is neither a path nor {{path:…,weight:…}}")
    if unknown := item.keys() - {"path", "weight"}:
        raise ValueError(f"'{min(unknown)}' is not a setting of a part; write {{path:…,weight:…}}")
    weight = item.get("weight")
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if weight is not None and not (is_number and 0 < weight < float("inf")):
        raise ValueError(f"weight {weight} of {item['path']} must be a number above 0")
    return DataPart(path=item["path"], weight=weight)


def _as_typed(item: Any) -> str:
    """Return the item as the user types it on the command line."""
    if isinstance(item, dict):
        return "{" + ",".join(f"{key}:{_as_typed(value)}" for key, value in item.items()) + "}"
    return "[" + ",".join(map(_as_typed, item)) + "]" if isinstance(item, list) else str(item)


def _as_columns(value: Any) -> Any:
    """Check that the value is {key: column}, each side a text."""
    if value is None:
        return None
    if not isinstance(value, dict) or not value:
        raise ValueError("write {KEY: COLUMN} in quotes, e.g. '{instruction: question, output: answer}'")
    for key, column in value.items():
        if isinstance(column, dict | list | bool | None) or column == "":
            raise ValueError(f"give the file's column for '{key}', in quotes if it is no plain name")
    return {str(key): str(column) for key, column in value.items()}


def _system_text(text: str) -> str:
    if not text.strip():
        raise ValueError("an empty system turn is not the same as none; leave it out for the template's own default")
    return text


def _as_validation(value: Any) -> Any:
    """Convert named sets, {NAME: PATH}, to parts by name; any other value is one set without a name."""
    if not isinstance(value, dict):
        return _as_parts(value)
    if value.keys() <= {"path", "weight"}:
        raise ValueError("give the parts as a list, [a.jsonl,b.jsonl], or sets with names, {NAME: a.jsonl}")
    for name, path in value.items():
        if not re.fullmatch(r"[\w-]+", str(name)) or name in METRICS:
            raise ValueError(f"'{name}': a set's name has letters, digits, - and _, and is not loss or accuracy")
        if not path or not isinstance(path, str | list | tuple):
            raise ValueError(f"give a path, or a list of paths, for the set '{name}'")
    return {str(name): _as_parts(path) for name, path in value.items()}


Parts = str | tuple[DataPart, ...]
DataPath = Annotated[Parts | None, BeforeValidator(_as_parts)]
ValidationPath = Annotated[Parts | dict[str, Parts] | None, BeforeValidator(_as_validation)]
METRICS = ("loss", "accuracy")
"""Names that no validation set may have, because val/loss and val/accuracy are those of all sets."""


@config_dataclass
class DataConfig:
    """Which rows to train on and how they become tokens."""

    path: DataPath = None
    """A file (.jsonl .json .parquet .csv .txt; text formats also .gz), a folder of such files or from `save_to_disk`, a
    glob, hf:ORG/NAME[:SPLIT], or a list: [a.jsonl,b.parquet] joins, [{path:a.jsonl,weight:3},{path:b.csv,weight:1}]
    mixes by weight. `qwlit:demo/train.jsonl` is the bundled corpus."""
    val_path: ValidationPath = None
    """Rows to validate on, in the same forms as `path`. Several sets by name, {math: a.jsonl, chat: [b.jsonl,c.jsonl]},
    also have val/math/loss and val/chat/loss. null: see `val_fraction`."""
    val_fraction: Probability = 0.0
    """Share of rows (0 to 1) held out for validation if there is no `val_path`. A hash of the row's tokens decides: a
    row stays on its side when other rows are added or removed, and all copies of a row are on one side. So the share of
    few rows is only about this one. From .txt files, qwlit holds out samples, not whole files."""
    max_samples: PositiveInt | None = None
    """Most samples from each part of `path` and of `val_path`: the first ones; there qwlit stops reading. A long text
    may be several samples, a row that is not used is none, and neither is a copy that `drop_duplicates` leaves out.
    `val_fraction` holds out some of these samples."""
    format: RowFormat = "auto"
    """Format of the rows. `auto` finds it by the keys of each row; a fixed format reads only its own keys."""
    columns: Annotated[dict[str, str] | None, BeforeValidator(_as_columns)] = None
    """Names of columns in the files, if they are not those of the format: {instruction: question, output: answer} reads
    the column `question` as `instruction`. Every file must have them."""
    template: TemplateName = "auto"
    """Chat template. `auto` recognises the tokenizer's own template, with any default system text. It uses an unknown
    template through its `{% generation %}` marks, and refuses one without them."""
    system: Annotated[str, AfterValidator(_system_text)] | None = None
    """System text of conversations without a system turn, also in the exported chat template. null: the default of the
    chat template, which is no text for Qwen3."""
    loss_on: LossOn = "assistant"
    """What is supervised in a conversation: every answer with its end-of-turn token, only the last answer, or every
    token except the turns that a row marks as not supervised. All of a plain text is supervised; tokenized rows have
    their own mask, and need `all` if they have none."""
    thinking: Thinking = "mask_empty"
    """Reasoning in answers. `mask_empty` supervises it where the row has some. Before an answer without reasoning the
    template puts an empty block; the model only reads it, because at inference it is part of the prompt. `keep`
    supervises the empty block too: the model then learns to skip thinking. `drop` removes all reasoning."""
    packing: Flag = True
    """Pack samples end to end, each attending only to itself, without padding. False: pad each sample on the right."""
    max_seq_len: TwoOrMore = 2048
    """Most tokens that a sample may have; see `too_long`. Most conversations fit into 2048."""
    too_long: TooLong = "auto"
    """What qwlit does with longer rows: drop and count them, truncate them at the end, split them into several samples,
    or refuse the run. `auto` splits plain text and drops other rows."""
    drop_duplicates: Flag = False
    """Train only once on samples with the same tokens and loss mask. qwlit counts duplicates in any case."""
    max_bad_ratio: Ratio = 0.01
    """Largest share of unusable rows (0 to 1) with which a run may start; up to three rows are always allowed."""
    strict: Flag = False
    """Stop at the first unusable row instead of quarantining it."""
    exact_match: NonNegativeInt = 0
    """Validation samples that the model answers greedily at the end, for exact comparison. 0: none, for free text."""


def parts_of(path: Parts | dict[str, Parts] | None) -> tuple[DataPart, ...]:
    """Return the parts of a path setting; a single path is one part, and named sets follow each other."""
    if path is None:
        return ()
    if isinstance(path, dict):
        return tuple(part for parts in path.values() for part in parts_of(parts))
    return (DataPart(path=path),) if isinstance(path, str) else path


def validation_sets(path: Parts | dict[str, Parts] | None) -> dict[str, tuple[DataPart, ...]]:
    """Return the parts of each validation set by its name; a set without a name has the name ""."""
    if path is None:
        return {}
    return {name: parts_of(parts) for name, parts in (path if isinstance(path, dict) else {"": path}).items()}


def check_weights(data: DataConfig) -> None:
    """Raise ConfigError if only some parts of `data.path` have weights, or a part of `data.val_path` has one."""
    if len({part.weight is None for part in parts_of(data.path)}) > 1:
        raise ConfigError("data.path: give all parts a weight, or no part")
    if any(part.weight is not None for part in parts_of(data.val_path)):
        raise ConfigError("data.val_path takes no weights: every row is validated once")
