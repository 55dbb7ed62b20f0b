"""What is wrong with a configuration, in one line."""

import dataclasses
import re
from typing import Any

from pydantic import ValidationError

from qwlit.config.run import RunConfig
from qwlit.core.errors import nearest


def explain(error: ValidationError, groups: list[str]) -> str:
    """Turn pydantic's first finding into one line: field, rule, nearest name among settings and `groups`."""
    finding = error.errors()[0]
    owner, names = _trace([str(part) for part in finding["loc"]])
    field = ".".join(names)
    if finding["type"] == "unexpected_keyword_argument":
        known = [f.name for f in dataclasses.fields(owner)] + (groups if owner is RunConfig else [])
        prefix = field.removesuffix(names[-1])
        hint = nearest(field, [prefix + name for name in known]) or f" Known here: {', '.join(sorted(set(known)))}."
        return f"{field}: no such setting.{hint}"
    if finding["type"] in ("missing", "missing_argument"):
        return f"{field} is not set"
    rule = finding["msg"].removeprefix("Value error, ")
    rule = rule[0].lower() + rule[1:].replace("a valid tuple", "a list, [first,second]")
    value = finding["input"]
    hint = nearest(str(value), re.findall(r"'([^']+)'", rule)) if finding["type"] == "literal_error" else ""
    return f"{field}={value}: {rule}.{hint}"


def _trace(location: list[str]) -> tuple[Any, list[str]]:
    """Follow pydantic's location through the dataclasses, leaving out the names it gives to members of a union.

    Returns:
        The innermost dataclass on the way, and the setting's dotted name in parts.
    """
    owner: Any = RunConfig
    names: list[str] = []
    for name in location:
        names.append(name)
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
