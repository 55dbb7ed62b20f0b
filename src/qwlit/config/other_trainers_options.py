"""The table of other trainers' options and subcommands, resources/other_trainers.yaml.

docs/coming-from.md shows it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import yaml

from qwlit.config.other_trainers_values import LEAVE_OUT, READ_WHOLE, READERS, Others, quoted
from qwlit.core.files import resolve_path

TABLE = "qwlit:other_trainers.yaml"
TRAINERS = {"lf": "LLaMA-Factory", "trl": "TRL", "axolotl": "axolotl", "swift": "ms-swift"}
OTHERS = "also"
"""Key of the names in LitGPT, Lightning, peft and older versions."""
SHARED, SHARING = "hf", ("lf", "trl", "swift")
"""Key of the names in transformers' TrainingArguments, and the trainers that take these."""
NOT_NEEDED, NOT_YET = "not needed: ", "not in this version: "
OFF = ("false", "none", "no", "null", "0", "[]", "")
"""Values that switch an option off."""
PYTHONS = {"True": "true", "False": "false", "None": "null"}
"""Values in Python's spelling, as transformers takes them, and in YAML's."""


@dataclass(frozen=True)
class Option:
    """One option of other trainers. resources/other_trainers.yaml explains the fields."""

    names: Mapping[str, tuple[str, ...]]
    """Trainer → its names for this option."""
    values: Mapping[str, str]
    ours: str = ""
    read: str = ""
    instead: str = ""
    missing: str = ""
    needless: str = ""
    note: str = ""
    theirs: tuple[str, ...] = ()
    """Values that other trainers have and qwlit has not."""

    def has_options(self) -> bool:
        """Whether a mapping as the value has options of its own."""
        return bool(self.ours) and self.read not in READ_WHOLE

    def answer(self, value: str, others: Others = MappingProxyType({})) -> str:
        """Return what to type instead of this option with this value, or why there is nothing to type.

        Args:
            others: the values of all options typed, see other_trainers_values.py.
        """
        value = plain_value(value)
        if value.lower() in self.values:
            return self.values[value.lower()]
        if self.needless:
            return NOT_NEEDED + self.needless
        if value.lower() in OFF and (self.instead or self.missing or self.values):
            return LEAVE_OUT
        if self.instead or self.missing:
            return self.instead or NOT_YET + self.missing
        if self.read:
            return READERS[self.read](self.ours, value, others)
        return quoted(self.ours.format(value=value) if "{value}" in self.ours else f"{self.ours}={value}")


def plain_value(text: str) -> str:
    """Return a value without quotes and without the comma at its end, and Python's words as those of YAML."""
    value = text.removesuffix(",").strip("'\"")
    return PYTHONS.get(value, value)


@lru_cache
def read_table() -> dict[str, Any]:
    """Return the file: `commands`, and `options` by topic as lists of Option."""
    # Only text: YAML would read `true` and `no` as truth values. The loader in C takes a fifth of the time.
    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    table: dict[str, Any] = yaml.load(resolve_path(TABLE).read_text(encoding="utf-8"), loader)
    topics = {topic: [_option(entry) for entry in entries] for topic, entries in table["options"].items()}
    return {"commands": table["commands"], "options": topics}


def _option(entry: dict[str, Any]) -> Option:
    names: dict[str, tuple[str, ...]] = {}
    for trainer in (SHARED, *TRAINERS, OTHERS):
        written = entry.pop(trainer, [])
        own = (written,) if isinstance(written, str) else tuple(written)
        for each in SHARING if trainer == SHARED else (trainer,):
            names[each] = names.get(each, ()) + own
    return Option(names, entry.pop("values", {}), theirs=tuple(entry.pop("theirs", ())), **entry)


@lru_cache
def options_by_name() -> dict[str, Option]:
    """Return every name of every trainer with its option."""
    options = (option for entries in read_table()["options"].values() for option in entries)
    return {name: option for option in options for names in option.names.values() for name in names}


def find_option(name: str) -> Option | None:
    """Return the option of this name; `training_args.learning_rate` is found as `learning_rate`."""
    if exact := options_by_name().get(name) or options_by_name().get(name.lower()):
        return exact
    option = options_by_name().get(name.rpartition(".")[2])
    # `optmi.lr` is a misspelt setting of qwlit.
    return None if option and get_close_matches(name, [option.ours], cutoff=0.8) else option


def command_answer(name: str) -> str | None:
    """Return what to type instead of another trainer's subcommand; None if it is not known."""
    answer: str | None = read_table()["commands"].get(name)
    return answer
