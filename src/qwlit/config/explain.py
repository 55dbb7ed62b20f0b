"""Explain in one line what is wrong with a configuration."""

import dataclasses
import re
from typing import Any, get_args

from pydantic import ValidationError

from qwlit.config.other_trainers import PAGE, meant
from qwlit.config.other_trainers_options import find_option
from qwlit.config.overrides import format_value, show_value
from qwlit.config.run import RunConfig
from qwlit.core.errors import nearest

# pydantic's phrases about Python types → phrases about typed settings.
PLAIN_PHRASES = {
    "a valid boolean": "true or false",
    "a valid tuple": "a list, [first,second]",
    "^field required": "give two values, [first,second]",
    r"a dictionary or an instance of \w+": "settings, key by key",
}
RENAMED = {
    "hardware.memory": "hardware.activation_checkpointing",
    "logger.wandb": "logger.use: type logger=wandb, and in a run's config.yaml replace `wandb: true` by `use: [wandb]`,"
    " `wandb: false` by `use: []`",
}
"""Old name of a setting → its new name, for the error message."""


def explain(error: ValidationError, groups: list[str]) -> str:
    """Turn pydantic's first error into one line: field, rule, and the nearest name among settings and `groups`."""
    # A misspelled name gives two errors, an unknown and a missing name. The unknown one is more helpful.
    findings = sorted(error.errors(), key=lambda finding: finding["type"] != "unexpected_keyword_argument")
    finding = findings[0]
    owner, names = _trace([str(part) for part in finding["loc"]])
    field = re.sub(r"\.(\d+)", r"[\1]", ".".join(names))
    if finding["type"] == "unexpected_keyword_argument":
        known = [f.name for f in dataclasses.fields(owner)] + (groups if owner is RunConfig else [])
        if field in groups:
            return f"{field}: a file of this group needs '# @package _global_' in its first line"
        if field in RENAMED:
            return f"{field} is now called {RENAMED[field]}"
        if option := find_option(field):
            return f"{field}: no such setting; instead: {option.answer(format_value(finding['input']))} ({PAGE})"
        prefix = field.removesuffix(names[-1])
        near = nearest(field, [prefix + name for name in known])
        hint = f".{near}" if near else meant(field)
        return f"{field}: no such setting" + (hint or f". Known here: {', '.join(sorted(set(known)))}.")
    if finding["type"] in ("missing", "missing_argument") and not isinstance(finding["loc"][-1], int):
        return f"{field} is not set"
    rule = finding["msg"].removeprefix("Value error, ")
    rule = rule[0].lower() + rule[1:]
    for jargon, plain in PLAIN_PHRASES.items():
        rule = re.sub(jargon, plain, rule)
    rule += _alternatives(finding, findings)
    value = show_value(finding["input"])
    return f"{field}={value}: {rule}.{_hint(finding['type'], finding['input'], rule)}"


def _alternatives(finding: Any, findings: list[Any]) -> str:
    """Return the words that a setting of another type takes too, such as 'auto'."""
    words = [
        other["ctx"]["expected"]
        for other in findings
        if other is not finding and other["type"] == "literal_error" and other["loc"][:-1] == finding["loc"][:-1]
    ]
    return "".join(f", or {expected}" for expected in words)


def _hint(kind: str, value: Any, rule: str) -> str:
    """Return what is probably meant instead of a wrong value; empty if nothing is near."""
    text = format_value(value)
    if kind == "literal_error":
        return nearest(text, re.findall(r"'([^']+)'", rule))
    if kind == "tuple_type" and isinstance(value, dict):
        return f" Write a list with brackets, [{','.join(map(str, value))}]."
    if percent := re.fullmatch(r"(\d+(?:\.\d+)?)%", text):
        return f" Write {float(percent[1]) / 100:g}."
    return ""


def _trace(location: list[str]) -> tuple[Any, list[str]]:
    """Follow pydantic's location through the dataclasses, without its names for the members of a union.

    Returns:
        The innermost dataclass reached, and the parts of the setting's dotted name.
    """
    owner: Any = RunConfig
    names: list[str] = []
    for name in location:
        names.append(name)
        if name.isdigit():
            continue
        type_ = {field.name: field.type for field in dataclasses.fields(owner)}.get(name)
        inner = [member for member in (type_, *get_args(type_)) if dataclasses.is_dataclass(member)]
        if not inner:
            break
        owner = inner[0]
    return owner, names
