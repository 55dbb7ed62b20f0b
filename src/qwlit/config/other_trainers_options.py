"""The table of other trainers' options and subcommands, resources/other_trainers.yaml.

docs/coming-from.md shows it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import yaml

from qwlit.config.other_trainers_values import READERS, Answer, Others
from qwlit.core.files import resolve_path

TABLE = "qwlit:other_trainers.yaml"
TRAINERS = {"lf": "LLaMA-Factory", "trl": "TRL", "axolotl": "axolotl", "swift": "ms-swift"}
OTHERS = "also"
"""Key of the names in LitGPT, Lightning, peft and older versions."""
SHARED, SHARING = "hf", ("lf", "trl", "swift")
"""Key of the names in transformers' TrainingArguments, and the trainers that take these."""
NOT_NEEDED, NOT_YET, LEAVE_OUT = "not needed: ", "not in this version: ", "leave it out"
OFF = ("false", "none", "no", "null", "0", "[]", "")
"""Values that switch an option off."""
PYTHONS = {"True": "true", "False": "false", "None": "null"}
"""Values in Python's spelling, as transformers takes them, and in YAML's."""


@dataclass(frozen=True)
class Option:
    """One option of other trainers. resources/other_trainers.yaml explains the fields."""

    names: Mapping[str, tuple[str, ...]]
    """Trainer → its names for this option."""
    values: Mapping[str, str] = field(default_factory=dict)
    patterns: Mapping[str, str] = field(default_factory=dict)
    ours: str = ""
    read: str = ""
    instead: str = ""
    """Also why the option is missing or needless."""
    note: str = ""

    def has_options(self) -> bool:
        """Whether a mapping as the value has options of its own."""
        return bool(self.ours) and self.read != "columns_of_swift"

    def by_value(self, value: str) -> str | None:
        """Return the answer that the table gives to this value, empty where it only knows the value; else None."""
        found = (re.fullmatch(pattern, value) for pattern in self.patterns)
        expanded = (match.expand(self.patterns[match.re.pattern]) for match in found if match)
        return self.values.get(value.lower(), next(expanded, None))

    def answer(self, value: str, others: Others = MappingProxyType({})) -> Answer:
        """Return what to type instead of this option with this value, or why there is nothing to type.

        Args:
            others: the values of all options typed, see other_trainers_values.py.
        """
        value = plain_value(value)
        is_off = value.lower() in OFF and bool(self.instead or self.values) and not self.instead.startswith(NOT_NEEDED)
        if text := self.by_value(value) or (LEAVE_OUT if is_off else self.instead):
            return _parsed(text)
        if self.read:
            return READERS[self.read](self.ours, value, others)
        key, _, template = self.ours.partition("=")
        return Answer({key: template.format(value=value) or value})


def _parsed(text: str) -> Answer:
    """Return the answer that the table writes as overrides and a remark in parentheses, or only as a text."""
    words, _, remark = text.partition(" (")
    pairs = [word.partition("=") for word in words.split()]
    if not all(equals for _, equals, _ in pairs):
        return Answer({}, text)
    return Answer({key: value for key, _, value in pairs}, remark.removesuffix(")"))


def plain_value(text: str) -> str:
    """Return a value without quotes and without the comma at its end, and Python's words as those of YAML."""
    value = text.strip().removesuffix(",").strip("'\"")
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
    written = {key: entry.pop(key, ()) for key in (SHARED, *TRAINERS, OTHERS)}
    lists = {key: (names,) if isinstance(names, str) else tuple(names) for key, names in written.items()}
    names = {key: lists[SHARED] * (key in SHARING) + lists[key] for key in (*TRAINERS, OTHERS)}
    for key, beginning in (("missing", NOT_YET), ("needless", NOT_NEEDED)):
        if key in entry:
            entry["instead"] = beginning + entry.pop(key)
    return Option(names, **entry)


def command_answer(words: Sequence[str]) -> str | None:
    """Return what to type instead of a command line that starts with another trainer's name or subcommand, else None.

    `trl dpo` and `llamafactory-cli chat` are answered as `dpo` and `chat`.
    """
    commands = read_table()["commands"]
    answers = [commands[word] for word in words[:2] if word in commands]
    if not words or words[0] not in commands:
        return None
    answer: str = answers[-1] if answers[0].startswith("train") else answers[0]
    return answer if answer.startswith(NOT_YET.strip(": ")) else f"no such subcommand; type {answer}"


@lru_cache
def options_by_name() -> dict[str, Option]:
    """Return every name of every trainer with its option."""
    options = (option for entries in read_table()["options"].values() for option in entries)
    return {name: option for option in options for names in option.names.values() for name in names}


def find_option(name: str) -> Option | None:
    """Return the option of this name; `training_args.learning_rate` is found as `learning_rate`.

    The number of an item of a list is left out: `datasets.0.path` and `datasets[0].path` are `datasets.path`.
    """
    name = re.sub(r"\.\d+(?=\.|$)|\[\d+\]", "", name)
    if exact := options_by_name().get(name) or options_by_name().get(name.lower()):
        return exact
    option = options_by_name().get(name.rpartition(".")[2])
    # `optmi.lr` is a misspelt setting of qwlit.
    return None if option and get_close_matches(name, [option.ours], cutoff=0.8) else option
