"""Options of other trainers: recognise them on the command line and say what to type here instead.

The table is resources/other_trainers.yaml; docs/coming-from.md shows it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import yaml

from qwlit.config.run import RunConfig, setting_names
from qwlit.core.errors import ConfigError
from qwlit.core.files import resolve_path

TABLE = "qwlit:other_trainers.yaml"
PAGE = "docs/coming-from.md"
TRAINERS = {"lf": "LLaMA-Factory", "trl": "TRL", "axolotl": "axolotl", "swift": "ms-swift"}
OTHERS = "also"
"""Key of the names in LitGPT, Lightning, peft and older versions."""
SHARED, SHARING = "hf", ("lf", "trl", "swift")
"""Key of the names in transformers' TrainingArguments, and the trainers that take these."""
SETTINGS_FILES = (".yaml", ".yml", ".json")
MOST_ANSWERS = 30
"""Answers for a settings file; the line would be too long with more."""
PAIRS = (("micro_batch", "accumulation"), ("beta1", "beta2"))
"""Options that give one setting together, by the functions that read them alone."""
LARGEST_FILE = 2**20
"""Bytes of a settings file; a larger one holds data."""
OFF = ("false", "none", "no", "null", "0", "[]", "")
"""Values that switch an option off."""
LEAVE_OUT = "leave it out"
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

    def answer(self, value: str) -> str:
        """Return what to type instead of this option with this value, or why there is nothing to type."""
        value = PYTHONS.get(value, value.strip("'\""))
        if value.lower() in self.values:
            return self.values[value.lower()]
        if self.needless:
            return f"not needed: {self.needless}"
        if value.lower() in OFF and (self.instead or self.missing or self.values):
            return LEAVE_OUT
        if self.instead or self.missing:
            return self.instead or f"not in this version: {self.missing}"
        if self.read:
            return READERS[self.read](self.ours, value)
        return _quoted(self.ours.format(value=value) if "{value}" in self.ours else f"{self.ours}={value}")


@dataclass(frozen=True)
class Typed:
    """An option as typed, or as written in a settings file."""

    text: str
    name: str
    value: str


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
    return Option(names, entry.pop("values", {}), **entry)


@lru_cache
def options_by_name() -> dict[str, Option]:
    """Return every name of every trainer with its option."""
    options = (option for entries in read_table()["options"].values() for option in entries)
    return {name: option for option in options for names in option.names.values() for name in names}


def find_option(name: str) -> Option | None:
    """Return the option of this name; `training_args.learning_rate` is found as `learning_rate`."""
    if exact := options_by_name().get(name):
        return exact
    option = options_by_name().get(name.rpartition(".")[2])
    # `optmi.lr` is a misspelt setting of qwlit.
    return None if option and get_close_matches(name, [option.ours], cutoff=0.8) else option


def command_answer(name: str) -> str | None:
    """Return what to type instead of another trainer's subcommand; None if it is not known."""
    answer: str | None = read_table()["commands"].get(name)
    return answer


def refuse_options_of_others(arguments: Sequence[str], groups: Mapping[str, Sequence[str]]) -> None:
    """Refuse options of other trainers, all of them in one line.

    Args:
        groups: every group of settings with its choices.

    Raises:
        ConfigError: saying what to type instead.
    """
    own_files = any(argument.startswith("hydra.searchpath=") for argument in arguments)
    found: list[Typed] = []
    for typed in _read_arguments(arguments):
        if typed.name == "config":
            _refuse_file(typed)
        elif typed.text.startswith("-") or not _is_own(typed, groups, own_files):
            found.append(typed)
    if answers := list(_answers(found, groups, arguments)):
        raise ConfigError(f"not options of qwlit: {'; '.join(answers)}. All options are in {PAGE}")


def _read_arguments(arguments: Sequence[str]) -> Iterator[Typed]:
    """Yield the options typed as key=value, --key=value, --key value or --key, and settings files."""
    rest = list(arguments)
    while rest:
        text = rest.pop(0)
        key, equals, value = text.partition("=")
        if text.startswith("--") and not equals:
            values = []
            while rest and not rest[0].startswith("--") and "=" not in rest[0]:
                values.append(rest.pop(0))
            text, value = " ".join([text, *values]), ",".join(values) or "true"
        elif not equals and Path(text).suffix in SETTINGS_FILES:
            key, value = "config", text
        elif not equals:
            continue
        yield Typed(text, key.lstrip("+-").replace("-", "_"), value)


def _is_own(typed: Typed, groups: Mapping[str, Sequence[str]], own_files: bool) -> bool:
    """Whether qwlit has this option, and for a group also the choice."""
    if typed.name not in groups:
        # Of a setting that is a mapping, one entry can be typed: data.columns.system=context.
        return not {typed.name, typed.name.rpartition(".")[0]}.isdisjoint(setting_names())
    if own_files or typed.value in groups[typed.name]:
        return True
    # A wrong choice: only what is surely another trainer's value has another answer than the nearest choice.
    option = options_by_name().get(typed.name)
    is_path = "/" in typed.value or Path(typed.value).exists()
    return option is None or not (typed.value.lower() in option.values or (option.read and is_path))


def _answers(found: Sequence[Typed], groups: Mapping[str, Sequence[str]], arguments: Sequence[str]) -> Iterator[str]:
    """Yield `typed → answer` of every option that is another trainer's."""
    reads = {option.read: typed for typed in found if (option := find_option(typed.name)) and option.read}
    pairs = {first: [reads[first], reads[second]] for first, second in PAIRS if {first, second} <= reads.keys()}
    for first, (one, other) in pairs.items():
        values = one.value, other.value
        together = _batch_size(*values, arguments) if first == "micro_batch" else f"optim.betas=[{','.join(values)}]"
        yield f"{one.text} {other.text} → {together}"
    paired = list(chain(*pairs.values()))
    for typed in found:
        option = find_option(typed.name)
        same = [name for name in setting_names() if name.endswith(f".{typed.name}")]
        if typed in paired:
            continue
        if typed.name in setting_names() or (typed.name in groups and typed.value in groups[typed.name]):
            yield f"{typed.text} → {typed.name}={typed.value}"
        elif option is not None:
            yield f"{typed.text} → {option.answer(typed.value)}"
        elif "." not in typed.name and len(same) == 1:
            yield f"{typed.text} → {same[0]}={typed.value}"


def _refuse_file(typed: Typed) -> None:
    """Refuse another trainer's settings file, with the answers of its first options."""
    try:
        file = resolve_path(typed.value)
        if file.stat().st_size > LARGEST_FILE:
            return
        tree = yaml.load(file.read_text(encoding="utf-8"), yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return  # the error of `config=` says why
    if not isinstance(tree, dict):
        return
    if tree.keys() <= RunConfig.__dataclass_fields__.keys():
        if not typed.text.startswith("config="):
            raise ConfigError(f"{typed.text}: write config={typed.value}")
        return
    found = [Typed(name, name, value) for name, value in _file_options(tree, "")]
    if all(typed.name in setting_names() or find_option(typed.name) is None for typed in found):
        return
    answers = [a for a in _answers(found, {}, ()) if not a.endswith(LEAVE_OUT) and "→ not needed" not in a]
    if answers:
        more = f"; {len(answers) - MOST_ANSWERS} more" if len(answers) > MOST_ANSWERS else ""
        raise ConfigError(
            f"{typed.value} is a settings file of another trainer; type its options here:"
            f" {'; '.join(answers[:MOST_ANSWERS])}{more}. All options are in {PAGE}"
        )


def _file_options(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    """Yield name and value of the options in a settings file; an empty value says nothing."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        option = find_option(name)
        if isinstance(value, dict) and (option is None or option.ours):
            yield from _file_options(value, f"{name}.")
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            keys = dict.fromkeys(key for item in value for key in item)
            together = {key: ",".join(str(item[key]) for item in value if key in item) for key in keys}
            yield from _file_options(together, f"{name}.")
        elif isinstance(value, list):
            yield name, f"[{','.join(map(str, value))}]"
        elif value not in ("", "null", "~"):
            yield name, str(value)


def _micro_batch(ours: str, value: str) -> str:
    return f"hardware.micro_batch_size={value}, and in train.global_batch_size all samples of a step on all devices"


def _accumulation(ours: str, value: str) -> str:
    return f"train.global_batch_size = hardware.micro_batch_size x {value} x devices"


def _beta1(ours: str, value: str) -> str:
    return f"optim.betas=[{value},0.999]"


def _beta2(ours: str, value: str) -> str:
    return f"optim.betas=[0.9,{value}]"


def _batch_size(micro: str, accumulation: str, arguments: Sequence[str]) -> str:
    """Return the overrides for a micro-batch and an accumulation typed together."""
    if not (micro.isdecimal() and accumulation.isdecimal()):
        return f"hardware.micro_batch_size={micro} train.global_batch_size = {micro} x {accumulation} x devices"
    overrides = dict(argument.lstrip("+").partition("=")[::2] for argument in arguments)
    counts = [overrides.get(key, "") for key in ("hardware.devices", "hardware.num_nodes")]
    devices = [int(count) for count in counts if count.isdecimal()]
    size = int(micro) * int(accumulation) * prod(devices)
    on = "" if devices else " (on one device, N times that on N)"
    return f"hardware.micro_batch_size={micro} train.global_batch_size={size}{on}"


def _model(ours: str, value: str) -> str:
    is_folder = value.startswith((".", "/", "~")) or resolve_path(value).is_dir() or value.count("/") != 1
    return _quoted(f"model.path={value}" if is_folder else f"model.hub_id={value}")


def _data(ours: str, value: str) -> str:
    # ms-swift writes a number of rows behind the name: ORG/NAME#500.
    parts = [part.strip().partition("#") for part in value.strip("[]").split(",")]
    paths = [_data_path(name) for name, _, _ in parts]
    rows = f" data.max_samples={parts[0][2]}" if parts[0][2] else ""
    return _quoted(f"{ours}={paths[0]}" if len(paths) == 1 else f"{ours}=[{','.join(paths)}]") + rows


def _data_path(name: str) -> str:
    """Return the path of a data set's name: a file as it is, ORG/NAME on the hub, else a placeholder."""
    if name.startswith(("/", ".", "~", "hf:")) or Path(name).suffix or resolve_path(name).exists():
        return name
    return f"hf:{name}" if name.count("/") == 1 else f"FILE_OF_{name}"


def _modules(ours: str, value: str) -> str:
    names = re.findall(r"""[^\s,\[\]"']+""", value)
    return _quoted(f"{ours}=[{','.join(names)}]")


def _folder(ours: str, value: str) -> str:
    path = Path(value)
    return _quoted(f"run.root={path.parent}") + " " + _quoted(f"run.name={path.name}")


READERS = {
    "beta1": _beta1,
    "beta2": _beta2,
    "micro_batch": _micro_batch,
    "accumulation": _accumulation,
    "model": _model,
    "data": _data,
    "modules": _modules,
    "folder": _folder,
}


def _quoted(override: str) -> str:
    """Put an override that a shell would split or expand into quotes."""
    return f"'{override}'" if re.search(r"[\s{}*?|&;<>()$]", override) else override
