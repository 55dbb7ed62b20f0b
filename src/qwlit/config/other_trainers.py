"""Options of other trainers: recognise them on the command line and say what to type here instead."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import reduce
from pathlib import Path
from typing import Any

import yaml

from qwlit.config.other_trainers_options import (
    NOT_NEEDED,
    NOT_YET,
    OFF,
    find_option,
    options_by_name,
    plain_value,
)
from qwlit.config.other_trainers_values import LEAVE_OUT, quoted, read_mapping
from qwlit.config.run import RunConfig, setting_names
from qwlit.core.errors import ConfigError, one_line
from qwlit.core.files import resolve_path
from qwlit.core.yaml_files import read_yaml

PAGE = "docs/coming-from.md"
SECRET = re.compile("token$|api_key|password", re.IGNORECASE)
"""Names of options whose value no message may show."""
DASHED = re.compile("--?[A-Za-z]")
IN_YAML = re.compile(r"([A-Za-z_][\w.]*): +(.*)")
"""An option as a settings file writes it."""
SETTINGS_FILES = (".yaml", ".yml", ".json")
SCRIPTS = (".py", ".sh", ".ipynb")
OWN_OPTIONS = {
    "cfg",
    "output",
    "mfu",
    "sample",
    "runs",
    "baseline",
    "page",
    "sweep",
    "backend",
    "action",
    "trials",
    "jobs",
    "agents",
    "dry_run",
    "seeds",
    "tasks",
    "hydra",
}
"""Options of qwlit's subcommands, which are not settings of a run."""
ALTERNATIVES = {
    "train.max_epochs": "train.max_steps",
    "scheduler.warmup_ratio": "scheduler.warmup_steps",
    "data.val_fraction": "data.val_path",
    "validation.every_steps": "validation.each_epoch",
    "checkpoint.every_steps": "checkpoint.each_epoch",
    "logger": "logger.use",
}
"""Setting → the setting that replaces it where another trainer's options give both."""
RECIPES = ("full_sft", "pretrain", "freeze", "lora", "qlora")
"""The recipes; where several options name one, the last of these counts."""
WORD = re.compile(r"""\s*(?:'[^']*'|"(?:\\.|[^"\\])*"|[^\s'"\\])+""")
"""A word as a shell reads it."""
LARGEST_FILE = 2**20
"""Bytes of a settings file; a larger one holds data."""


@dataclass(frozen=True)
class Typed:
    """An option as typed, or as written in a settings file."""

    text: str
    name: str
    value: str

    def __str__(self) -> str:
        # A log may keep the error message.
        return f"{self.name}=…" if SECRET.search(self.name) else self.text


@dataclass
class Answer:
    """What to type here instead of one or several options that set the same."""

    typed: list[Typed]
    overrides: dict[str, str] = field(default_factory=dict)
    remark: str = ""
    """About the overrides; without any, why there are none."""
    is_weak: bool = False
    """Whether another answer with the same setting replaces this one."""

    def command(self) -> str:
        """Return the overrides as words of a shell."""
        return " ".join(quoted(f"{key}={value}") for key, value in self.overrides.items())

    def __str__(self) -> str:
        texts = " ".join(dict.fromkeys(map(str, self.typed)))
        remark = f" ({self.remark})" if self.overrides and self.remark else self.remark
        return f"{texts} → {self.command()}{remark}"


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
            _refuse_file(typed, arguments)
        elif typed.text.startswith("-") or not _is_own(typed, groups, own_files):
            found.append(typed)
    answers, unknown = _answers(found, groups, arguments)
    if answers:
        said = [*map(str, answers), *(f"{typed} → not known{meant(typed.name)}" for typed in unknown)]
        raise ConfigError(f"not options of qwlit: {'; '.join(said)}. All options are in {PAGE}")


def _read_arguments(arguments: Sequence[str]) -> Iterator[Typed]:
    """Yield the options typed as key=value, --key=value, --key value, --key or "key: value", and settings files."""
    rest = list(arguments)
    while rest:
        text = rest.pop(0)
        key, equals, value = text.partition("=")
        if DASHED.match(text) and not equals:
            values = []
            while rest and not DASHED.match(rest[0]) and "=" not in rest[0]:
                values.append(rest.pop(0))
            text, value = " ".join([text, *values]), ",".join(values) or "true"
        elif not equals and Path(text).suffix in SETTINGS_FILES:
            key, value = "config", text
        elif not equals and Path(text).suffix in SCRIPTS:
            raise ConfigError(f"{text}: a script is not read; type its options as key=value, see {PAGE}")
        elif in_yaml := IN_YAML.fullmatch(text):
            key, value = in_yaml.groups()
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
    value = plain_value(typed.value).lower()
    is_path = "/" in value or Path(value).exists()
    is_list = typed.name == "logger" and re.search("[],]", value)
    return option is None or not (value in (*option.values, *option.theirs) or (option.read and (is_path or is_list)))


def _answers(
    found: Sequence[Typed], groups: Mapping[str, Sequence[str]], arguments: Sequence[str]
) -> tuple[list[Answer], list[Typed]]:
    """Return the answers to the options that are another trainer's, and the options that nobody has."""
    found = [part for typed in found for part in _parts(typed)]
    options = [find_option(typed.name) for typed in found]
    others = {argument.lstrip("+").partition("=")[0]: argument.partition("=")[2] for argument in arguments}
    for typed, option in zip(found, options, strict=True):
        others[(option.read or option.ours) if option else typed.name] = plain_value(typed.value)
        others[typed.name] = plain_value(typed.value)
    answers, unknown = [], []
    for typed, option in zip(found, options, strict=True):
        same = [name for name in setting_names() if name.endswith(f".{typed.name}")]
        if typed.name in setting_names() or (typed.name in groups and typed.value in groups[typed.name]):
            answers.append(Answer([typed], {typed.name: typed.value}))
        elif option is not None:
            overrides, remark = split_answer(option.answer(typed.value, others))
            is_weak = option.read == "folder" or plain_value(typed.value).lower() in OFF or "N" in overrides.values()
            answers.append(Answer([typed], overrides, remark, is_weak))
        elif "." not in typed.name and len(same) == 1:
            answers.append(Answer([typed], {same[0]: typed.value}))
        elif typed.name.partition(".")[0] not in OWN_OPTIONS:
            unknown.append(typed)
    return _merged(answers), unknown


def _parts(typed: Typed) -> Iterator[Typed]:
    """Yield the entries of an option whose value is a mapping of options, else the option itself."""
    option = find_option(typed.name)
    is_mapping = typed.value.startswith("{") and option is not None and option.has_options()
    if is_mapping and (tree := read_mapping(typed.value)):
        yield from (Typed(typed.text, name, value) for name, value in _file_options(tree, f"{typed.name}."))
    else:
        yield typed


def split_answer(text: str) -> tuple[dict[str, str], str]:
    """Return the overrides at the beginning of an answer, and the remark behind them without its parentheses."""
    overrides: dict[str, str] = {}
    while found := WORD.match(text):
        key, equals, value = shlex.split(found[0])[0].partition("=")
        if not equals:
            break
        overrides[key] = value
        text = text[found.end() :].lstrip()
    return overrides, text[1:-1] if overrides and text.startswith("(") else text


def _merged(answers: Sequence[Answer]) -> list[Answer]:
    """Join answers with the same setting: of each setting one value is left."""
    merged: list[Answer] = []
    for answer in answers:
        slots = set(map(_slot, answer.overrides))
        earlier = [each for each in merged if slots & set(map(_slot, each.overrides))]
        merged = [each for each in merged if each not in earlier]
        merged.append(reduce(_joined, [*earlier, answer]))
    return merged


def _joined(first: Answer, second: Answer) -> Answer:
    """Join two answers; where they differ in a setting, the stronger value counts."""
    overrides = dict(first.overrides)
    for key, value in second.overrides.items():
        rival = next((other for other in overrides if _slot(other) == _slot(key)), None)
        if rival == key == "data.columns":
            overrides[key] = overrides[key].removesuffix("}") + ", " + value.removeprefix("{")
        elif rival is None or _replaces(key, value, rival, overrides[rival], first.is_weak >= second.is_weak):
            overrides.pop(rival or key, None)
            overrides[key] = value
    kept = [answer for answer in (first, second) if answer.overrides.items() <= overrides.items()]
    remark = ", ".join(dict.fromkeys(answer.remark for answer in kept if answer.remark))
    return Answer([*first.typed, *second.typed], overrides, remark, first.is_weak and second.is_weak)


def _slot(key: str) -> str:
    return ALTERNATIVES.get(key, key)


def _replaces(key: str, value: str, rival: str, rival_value: str, later_counts: bool) -> bool:
    """Whether a setting with this value replaces the rival, the same setting or its alternative."""
    if key == "recipe" and {value, rival_value} <= set(RECIPES):
        return RECIPES.index(value) >= RECIPES.index(rival_value)
    if key == rival:
        return later_counts
    preferred = value if key == _slot(key) else rival_value
    return (preferred != "0") == (key == _slot(key))


def meant(name: str) -> str:
    """Return the nearest name of a setting or of an option as a question in parentheses; empty if none is near."""
    near = get_close_matches(name.rpartition(".")[2], [*setting_names(), *options_by_name()], n=1, cutoff=0.75)
    if not near:
        return ""
    option = options_by_name().get(near[0])
    return f" (did you mean {near[0]}{f', here {option.ours}' if option and option.ours else ''}?)"


def _refuse_file(typed: Typed, arguments: Sequence[str]) -> None:
    """Refuse another trainer's settings file with the command that does the same."""
    is_named = typed.text.startswith("config=")
    try:
        file = resolve_path(typed.value)
        if file.stat().st_size > LARGEST_FILE:
            return
        tree = read_yaml(file, yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        if is_named:
            return  # the error of `config=` says why
        raise ConfigError(f"{typed.value}: {_why_unread(error)}") from None
    if not isinstance(tree, dict):
        return
    if tree.keys() <= RunConfig.__dataclass_fields__.keys():
        if not is_named:
            raise ConfigError(f"{typed.text}: write config={typed.value}")
        return
    found = [Typed(name, name, value) for name, value in _file_options(tree, "")]
    if all(typed.name in setting_names() or find_option(typed.name) is None for typed in found):
        return
    said = "; ".join(_said_of_file(*_answers(found, {}, arguments)))
    raise ConfigError(f"{typed.value} is a settings file of another trainer; {said}. All options are in {PAGE}")


def _why_unread(error: Exception) -> str:
    """Return why a settings file cannot be read."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1} is not YAML: {error.problem}"
    return f"cannot be read: {one_line(str(error))}"


def _said_of_file(answers: Sequence[Answer], unknown: Sequence[Typed]) -> Iterator[str]:
    """Yield the finished command, what is to be known about it, and all options that are not in it."""
    typed_here = [answer for answer in answers if answer.overrides]
    if typed_here:
        yield f"type: qwlit train {' '.join(answer.command() for answer in typed_here)}"
    yield from (f"{', '.join(answer.overrides)}: {answer.remark}" for answer in typed_here if answer.remark)
    texts = [answer for answer in answers if not answer.overrides]
    starts = {NOT_YET: NOT_YET, NOT_NEEDED: NOT_NEEDED, LEAVE_OUT: NOT_NEEDED}
    lists: dict[str, list[str]] = {NOT_YET: [], NOT_NEEDED: []}
    for answer in texts:
        start = next((start for start in starts if answer.remark.startswith(start)), None)
        if start is None:
            yield f"{answer}"
        else:
            lists[starts[start]].append(answer.typed[0].text)
    yield from (f"{start}{', '.join(names)}" for start, names in lists.items() if names)
    if unknown:
        yield f"not known: {', '.join(typed.text + meant(typed.name) for typed in unknown)}"


def _file_options(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    """Yield name and value of the options in a settings file; an empty value says nothing."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        option = find_option(name)
        if isinstance(value, dict) and (option is None or option.has_options()):
            yield from _file_options(value, f"{name}.")
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            keys = dict.fromkeys(key for item in value for key in item)
            together = {key: ",".join(dict.fromkeys(_text(item[key]) for item in value if key in item)) for key in keys}
            yield from _file_options(together, f"{name}.")
        elif value not in ("", "null", "~"):
            yield name, _text(value)


def _text(value: Any) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)
