"""What somebody else could hand to a user, and what must become of it: parts that all kinds of artefacts share."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CANARY = "executed"
"""A file of this name in the current folder says that code of an artefact ran."""
RUN = f"os.mkdir({CANARY!r})"
CODE = f"import os\n{RUN}\n"
ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202eexe.\u2066"
"""Sets the title of a terminal, clears it, colours it, and turns the text behind around."""
SMALL = ["hardware=cpu", "data.path=chat.jsonl", "train.max_steps=4", "logger=none"]
PLAN = ["plan", *SMALL, "model.path=model"]
TRAIN = ["train", *SMALL, "model.path=model", "run.name=new"]
INSPECT = ["inspect", "hardware=cpu", "model=demo", "data.path=chat.jsonl"]


@dataclass(frozen=True)
class Artefact:
    """A file, folder or override of somebody else, and the command to which the user gives it."""

    words: list[str]
    make: Callable[[Path], object] = lambda place: None
    """Puts it into the working folder."""
    says: str | None = None
    """A part of the one line with which the command refuses it. None: the command succeeds; what would be executed or
    read is passed over."""
    environment: tuple[str, str] | None = None


class Canary:
    """Makes a folder where it is unpickled."""

    def __reduce__(self) -> Any:
        return (os.mkdir, (CANARY,))


def write(name: str, content: str | bytes) -> Callable[[Path], object]:
    def make(place: Path) -> None:
        file = place / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def link(name: str, target: str) -> Callable[[Path], object]:
    def make(place: Path) -> None:
        (place / name).unlink(missing_ok=True)
        (place / name).symlink_to(target)

    return make


def all_of(*makers: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda place: [make(place) for make in makers]


def change(name: str, **entries: Any) -> Callable[[Path], object]:
    """Replace entries of a JSON object in a file."""

    def make(place: Path) -> None:
        file = place / name
        file.write_text(json.dumps(json.loads(file.read_text()) | entries))

    return make


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth
