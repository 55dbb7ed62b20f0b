"""Read YAML files of users, with limits: a small file can stand for a large tree, or have Python build objects."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qwlit.core.files import read_small_text

MOST_BYTES = 2**18
"""Reading takes about 2 s for a file of this size; the largest settings file of qwlit has about 4,000 bytes."""
DEEPEST = 32
"""Levels of mappings and lists."""
MOST_VALUES = 20_000
"""Values of the whole tree, those behind an alias counted each time."""
TEXT_OF_A_VALUE = 100
"""Characters; a longer text counts as several values."""
LONGEST_NUMBER = 100
"""Characters. Python needs quadratic time for a number's digits."""
NUMBER = re.compile(r"[-+.\d][\d_.:eE+-]*|[-+]?0[xob][\da-fA-F_]+")
CORE = "tag:yaml.org,2002:"
PLAIN_TAGS = {None, "!", *(CORE + name for name in ("str", "int", "float", "bool", "null", "seq", "map"))}


class YamlError(yaml.YAMLError):
    """The file is no YAML, or it is over a limit; the message names the line."""


@dataclass
class _Open:
    """A mapping or list whose end is not read yet."""

    anchor: str | None
    keys: set[str] | None
    """Of a mapping; None for a list."""
    size: int = 1
    children: int = field(default=0)

    def expects_key(self) -> bool:
        return self.keys is not None and self.children % 2 == 0


def read_yaml(file: Path, loader: type[Any]) -> Any:
    """Return the document of a YAML file.

    Raises:
        yaml.YAMLError: the file is no YAML or over a limit, names a key twice, or has a tag of YAML's own.
        OSError, UnicodeDecodeError: it cannot be read.
    """
    size = file.stat().st_size
    if size > MOST_BYTES:
        raise YamlError(f"it has {size:,} bytes, more than {MOST_BYTES:,}")
    text = read_small_text(file)
    _check(text, loader)
    try:
        return yaml.load(text, loader)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # PyYAML's constructors of numbers and dates raise these for a text that only looks like one.
        raise YamlError(f"a value cannot be read: {error}") from None


def _check(text: str, loader: type[Any]) -> None:
    """Refuse a document over a limit, before any value is built."""
    sizes: dict[str, int] = {}
    stack = [_Open(None, None)]
    for event in yaml.parse(text, Loader=loader):
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.CollectionEndEvent):
            closed = stack.pop()
            if closed.anchor is not None:
                sizes[closed.anchor] = closed.size
            _add(stack[-1], closed.size, line)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in {each.anchor for each in stack}:
                raise YamlError(f"line {line}: *{event.anchor} stands inside of &{event.anchor} itself")
            _add(stack[-1], sizes.get(str(event.anchor), 1), line)
        elif isinstance(event, yaml.NodeEvent):
            if getattr(event, "tag", None) not in PLAIN_TAGS:
                raise YamlError(f"line {line}: the tag {event.tag} is not allowed; write plain values")  # type: ignore[attr-defined]
            if isinstance(event, yaml.ScalarEvent):
                _check_scalar(event, stack[-1], line)
                size = 1 + len(event.value) // TEXT_OF_A_VALUE
                if event.anchor is not None:
                    sizes[event.anchor] = size
                _add(stack[-1], size, line)
            else:
                stack.append(_Open(event.anchor, set() if isinstance(event, yaml.MappingStartEvent) else None))
                if len(stack) > DEEPEST + 1:
                    raise YamlError(f"line {line}: more than {DEEPEST} levels of mappings and lists")


def _check_scalar(event: yaml.ScalarEvent, parent: _Open, line: int) -> None:
    if len(event.value) > LONGEST_NUMBER and event.style is None and NUMBER.fullmatch(event.value):
        raise YamlError(f"line {line}: a number of {len(event.value):,} characters; put text into quotes")
    if parent.keys is not None and parent.expects_key():
        if event.value in parent.keys:
            raise YamlError(f"line {line}: duplicate key {event.value}")
        parent.keys.add(event.value)


def _add(parent: _Open, size: int, line: int) -> None:
    parent.children += 1
    parent.size += size
    if parent.size > MOST_VALUES:
        raise YamlError(f"line {line}: more than {MOST_VALUES:,} values, those of aliases counted each time")
