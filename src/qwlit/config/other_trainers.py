"""Options of other trainers: recognise them on the command line and say what to type here instead."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from qwlit.config.other_trainers_options import (
    LEAVE_OUT,
    NOT_NEEDED,
    NOT_YET,
    OFF,
    find_option,
    options_by_name,
    plain_value,
)
from qwlit.config.other_trainers_values import Answer, read_value
from qwlit.config.relations import LENGTH, VALIDATION, WARMUP
from qwlit.config.run import RunConfig, setting_names
from qwlit.core.errors import ConfigError, one_line
from qwlit.core.files import resolve_path
from qwlit.core.yaml_files import read_yaml

PAGE = "docs/coming-from.md"
SECRET = re.compile("(?<!eos_|pad_|bos_|unk_)token$|api_key|password", re.IGNORECASE)
"""Names of options whose value no message may show."""
DASHED = re.compile("--?[A-Za-z]")
IN_YAML = re.compile(r"([A-Za-z_][\w.]*): +(.*)")
"""An option as a settings file writes it."""
YAML_KEY = re.compile(r"[A-Za-z_][\w.]*:")
"""The first word of an option in YAML that is typed without quotes."""
SETTINGS_FILES = (".yaml", ".yml", ".json")
SCRIPTS = (".py", ".sh", ".ipynb")
REPLACED_BY = {second: first for first, second in (LENGTH, WARMUP, VALIDATION)} | {
    "validation.every_steps": "validation.each_epoch",
    "checkpoint.every_steps": "checkpoint.each_epoch",
    "logger": "logger.use",
}
"""Setting → the setting that replaces it where another trainer's options give both."""
RECIPES = ("full_sft", "pretrain", "freeze", "lora", "qlora")
"""The recipes; where several options name one, the last of these counts."""
LARGEST_FILE = 2**20
"""Bytes of a settings file; a larger one holds data."""


class Typed(NamedTuple):
    """An option as typed, or as written in a settings file."""

    text: str
    name: str
    value: str

    def __str__(self) -> str:
        # A log may keep the error message.
        return f"{self.name}=…" if SECRET.search(self.name) else self.text


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
            has_options = typed.value.startswith(("{", "[{")) and find_option(typed.name)
            tree = {typed.name: read_value(typed.value) if has_options else typed.value}
            found += [Typed(typed.text, name, value) for name, value in _file_options(tree)]
    answers, unknown = _answers(found, groups, arguments)
    if answers:
        said = [*map(str, answers), *(f"{typed} → not known{meant(typed.name)}" for typed in unknown)]
        raise ConfigError(f"not options of qwlit: {'; '.join(said)}. All options are in {PAGE}")


def _read_arguments(arguments: Sequence[str]) -> Iterator[Typed]:
    """Yield the options typed as key=value, --key=value, --key value, --key, --no_key or key: value, and files."""
    rest = list(arguments)
    while rest:
        text = rest.pop(0)
        if YAML_KEY.fullmatch(text) and rest and "=" not in rest[0]:
            text = f"{text} {rest.pop(0)}"
        key, equals, value = text.partition("=")
        suffix = "" if equals else Path(text).suffix
        if DASHED.match(text) and not equals:
            values = list(itertools.takewhile(lambda word: not DASHED.match(word) and "=" not in word, rest))
            del rest[: len(values)]
            text, value = " ".join([text, *values]), ",".join(values) or "true"
        elif suffix in SETTINGS_FILES:
            key, value = "config", text
        elif suffix in SCRIPTS:
            raise ConfigError(f"{text}: a script is not read; type its options as key=value, see {PAGE}")
        elif in_yaml := IN_YAML.fullmatch(text):
            key, value = in_yaml.groups()
        elif not equals:
            continue
        name = key.lstrip("+-").strip().replace("-", "_")
        switched_on = name.removeprefix("no_")
        if text.startswith("-") and value == "true" and find_option(name) is None and find_option(switched_on):
            name, value = switched_on, "false"  # transformers' parser adds --no_bf16 to a switch
        yield Typed(text, name, value)


def _is_own(typed: Typed, groups: Mapping[str, Sequence[str]], own_files: bool) -> bool:
    """Whether qwlit has this option, and for a group also the choice."""
    if typed.name not in groups:
        # Of a setting that is a mapping, one entry can be typed: data.columns.system=context.
        return not {typed.name, typed.name.rpartition(".")[0]}.isdisjoint(setting_names() | {"hydra"})
    option, value = options_by_name().get(typed.name), plain_value(typed.value)
    if own_files or typed.value in groups[typed.name] or option is None:
        return True
    # A wrong choice: only what is surely another trainer's value has another answer than the nearest choice.
    is_path = "/" in value or Path(value).exists()
    return option.by_value(value) is None and not (option.read and is_path)


def _answers(
    found: Sequence[Typed], groups: Mapping[str, Sequence[str]], arguments: Sequence[str]
) -> tuple[list[Answer], list[Typed]]:
    """Return the answers to the options that are another trainer's, and the options that nobody has."""
    options = [(typed, find_option(typed.name)) for typed in found]
    others = {argument.lstrip("+").partition("=")[0]: argument.partition("=")[2] for argument in arguments}
    for typed, option in options:
        value = plain_value(typed.value)
        others |= {(option.read or option.ours) if option else typed.name: value, typed.name: value}
    answers: list[Answer] = []
    unknown = []
    for typed, option in options:
        same = [name for name in setting_names() if name.endswith(f".{typed.name}") and "." not in typed.name]
        if typed.name in setting_names() - options_by_name().keys() or typed.value in groups.get(typed.name, ()):
            answer = Answer({typed.name: typed.value})
        elif option is not None:
            answer = option.answer(typed.value, others)
        elif len(same) == 1:
            answer = Answer({same[0]: typed.value})
        else:
            unknown.append(typed)
            continue
        is_off = plain_value(typed.value).lower() in OFF
        is_weak = is_off or "run.root" in answer.overrides or "N" in answer.overrides.values()
        answers.append(replace(answer, typed=(str(typed),), is_weak=is_weak))
    return _merged(answers), unknown


def _merged(answers: Sequence[Answer]) -> list[Answer]:
    """Join answers with the same setting: of each setting one value is left."""
    merged: list[Answer] = []
    for answer in answers:
        earlier = [each for each in merged if _slots(each.overrides).keys() & _slots(answer.overrides).keys()]
        merged = [each for each in merged if each not in earlier]
        merged.append(reduce(_joined, [*earlier, answer]))
    return merged


def _joined(first: Answer, second: Answer) -> Answer:
    """Join two answers; where they differ in a setting, the stronger value counts."""
    overrides = dict(first.overrides)
    for slot, key in _slots(second.overrides).items():
        rival, value = _slots(overrides).get(slot), second.overrides[key]
        if rival == key == "data.columns" and overrides[key] != value:
            overrides[key] = overrides[key].removesuffix("}") + ", " + value.removeprefix("{")
        elif rival is None or _strength(second, key) >= _strength(first, rival):
            overrides.pop(rival or key, None)
            overrides[key] = value
    remarks = [each.remark for each in (first, second) if each.remark and each.overrides.items() <= overrides.items()]
    is_weak = first.is_weak and second.is_weak
    return Answer(overrides, ", ".join(dict.fromkeys(remarks)), first.typed + second.typed, is_weak)


def _slots(overrides: Mapping[str, str]) -> dict[str, str]:
    """Return the keys of the overrides by what they set: of keys that replace each other, the one that counts."""
    return {REPLACED_BY.get(key, key): key for key in overrides}


def _strength(answer: Answer, key: str) -> int:
    """Return a number: of two values for a setting the one with the higher number counts, else the later one."""
    value = answer.overrides[key]
    if key == "recipe" and value in RECIPES:
        return RECIPES.index(value)
    return 2 * (key in REPLACED_BY.values() and value != "0") - answer.is_weak


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
        reason = f"{error.strerror}".lower() if isinstance(error, OSError) else one_line(str(error))
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
            reason = f"line {error.problem_mark.line + 1} is not YAML: {error.problem}"
        raise ConfigError(f"{typed.value}: {reason}") from None
    if not isinstance(tree, dict):
        return
    is_own = tree.keys() <= RunConfig.__dataclass_fields__.keys()
    if is_own and not is_named:
        raise ConfigError(f"{typed.text}: write config={typed.value}")
    # An empty value says nothing.
    found = [Typed(name, name, value) for name, value in _file_options(tree) if value not in ("", "null", "~")]
    if not is_own and any(name not in setting_names() and find_option(name) for _, name, _ in found):
        said = "; ".join(_said_of_file(*_answers(found, {}, arguments)))
        raise ConfigError(f"{typed.value} is a settings file of another trainer; {said}. All options are in {PAGE}")


def _said_of_file(answers: Sequence[Answer], unknown: Sequence[Typed]) -> Iterator[str]:
    """Yield the finished command, what is to be known about it, and all options that are not in it."""
    here = [answer for answer in answers if answer.overrides]
    if here:
        yield f"type: qwlit train {' '.join(answer.command() for answer in here)}"
    yield from (f"{', '.join(answer.overrides)}: {answer.remark}" for answer in here if answer.remark)
    lists: dict[str, list[str]] = {NOT_YET: [], NOT_NEEDED: []}
    for answer in answers:
        found = re.match(f"{NOT_YET}|{NOT_NEEDED}|{LEAVE_OUT}", answer.remark)
        if found and not answer.overrides:
            lists[NOT_YET if found[0] == NOT_YET else NOT_NEEDED] += answer.typed
        elif not answer.overrides:
            yield f"{answer}"
    yield from (f"{beginning}{', '.join(names)}" for beginning, names in lists.items() if names)
    if unknown:
        yield f"not known: {', '.join(typed.text + meant(typed.name) for typed in unknown)}"


def _file_options(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield name and value of the options in a settings file; the options in a mapping have its name before theirs."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        option = find_option(name)
        if isinstance(value, dict) and (option is None or option.has_options()):
            yield from _file_options(value, f"{name}.")
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            keys = dict.fromkeys(key for item in value for key in item)
            together = {key: ",".join(dict.fromkeys(_text(item[key]) for item in value if key in item)) for key in keys}
            yield from _file_options(together, f"{name}.")
        else:
            yield name, _text(value)


def _text(value: Any) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)
