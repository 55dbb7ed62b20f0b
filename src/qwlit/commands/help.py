"""`train --help`, made from the dataclasses, so that it cannot be out of date."""

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any

from qwlit.config.compose import compose, group_options
from qwlit.config.run import RunConfig

WIDTH = 110
NAME_WIDTH = 38

INTRO = """\
python -m qwlit train [group=choice ...] [key=value ...]

Trains a model. The same command goes on with an unfinished run of the same name.

  train experiment=demo                                          two minutes, no network, no GPU
  train hardware=a100x4 recipe=full_sft                          four A100s, Qwen3-0.6B from the hub
  train model.path=FOLDER data.path=chat.jsonl data.val_fraction=0.05 recipe=lora
  train config=runs/NAME/config.yaml run.name=again              an earlier run's settings
  train ... --cfg job                                            print the settings, train nothing

Groups: group=choice takes a file of settings
"""


def train_help() -> str:
    groups = "".join(_entry(name, ", ".join(options)) for name, options in group_options().items())
    defaults = compose([]).config
    settings = "".join(_entry(f"{key}={_show(value)}", doc) for key, value, doc in _fields(RunConfig, defaults, ""))
    return f"{INTRO}{groups}\nSettings: key=value, with the value they have when nothing is typed\n{settings}"


def _fields(owner: Any, values: Any, prefix: str) -> Iterator[tuple[str, Any, str]]:
    """Yield (dotted key, default, help) of every field."""
    for field in dataclasses.fields(owner):
        value = getattr(values, field.name)
        if dataclasses.is_dataclass(value) and field.name != "architecture":
            yield from _fields(type(value), value, f"{prefix}{field.name}.")
        elif field.name != "architecture":
            description = owner.__pydantic_fields__[field.name].description or ""
            yield prefix + field.name, value, " ".join(description.split())


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, tuple | list):
        return "[" + ",".join(str(item) for item in value) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _entry(name: str, text: str) -> str:
    lines = textwrap.wrap(text, WIDTH - NAME_WIDTH - 4) or [""]
    head = f"  {name:<{NAME_WIDTH}}  "
    if len(name) > NAME_WIDTH:
        return f"  {name}\n" + "".join(f"{'':<{NAME_WIDTH + 4}}{line}\n" for line in lines)
    return head + f"\n{'':<{NAME_WIDTH + 4}}".join(lines) + "\n"
