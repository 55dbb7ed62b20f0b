"""What is wrong with a configuration, in one line."""

import dataclasses
import re
from typing import Any

from pydantic import ValidationError

from qwlit.config.run import RunConfig
from qwlit.core.errors import nearest

# What pydantic says of Python's types, for somebody who types settings.
PLAIN_WORDS = {
    "a valid tuple": "a list, [first,second]",
    "^field required": "give two values, [first,second]",
    r"a dictionary or an instance of \w+": "settings, key by key",
}


RENAMED = {"hardware.memory": "hardware.activation_checkpointing"}
"""Old names of settings, for people who know them."""


def explain(error: ValidationError, groups: list[str]) -> str:
    """Turn pydantic's first finding into one line: field, rule, nearest name among settings and `groups`."""
    # A name written wrong is also a name missing: the former says more.
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
        prefix = field.removesuffix(names[-1])
        hint = nearest(field, [prefix + name for name in known]) or f" Known here: {', '.join(sorted(set(known)))}."
        return f"{field}: no such setting.{hint}"
    if finding["type"] in ("missing", "missing_argument") and not isinstance(finding["loc"][-1], int):
        return f"{field} is not set"
    rule = finding["msg"].removeprefix("Value error, ")
    rule = rule[0].lower() + rule[1:]
    for jargon, plain in PLAIN_WORDS.items():
        rule = re.sub(jargon, plain, rule)
    value = finding["input"]
    hint = nearest(str(value), re.findall(r"'([^']+)'", rule)) if finding["type"] == "literal_error" else ""
    return f"{field}={_as_typed(value)}: {rule}.{hint}"


def _as_typed(value: Any) -> str:
    """Return the value as one types it: null and true, not None and True; one line."""
    known = {None: "null", True: "true", False: "false"}
    shown = known[value] if value is None or isinstance(value, bool) else str(value)
    return " ".join(shown.split())


def _trace(location: list[str]) -> tuple[Any, list[str]]:
    """Follow pydantic's location through the dataclasses, leaving out the names it gives to members of a union.

    Returns:
        The innermost dataclass on the way, and the setting's dotted name in parts.
    """
    owner: Any = RunConfig
    names: list[str] = []
    for name in location:
        names.append(name)
        if name.isdigit():
            continue
        field = next((f for f in dataclasses.fields(owner) if f.name == name), None)
        inner = (
            [t for t in (field.type, *getattr(field.type, "__args__", ())) if dataclasses.is_dataclass(t)]
            if field
            else []
        )
        if not inner:
            break
        owner = inner[0]
    return owner, names
