"""Atomic writes, JSON files, file locks, and paths to files of the package."""

import errno
import fcntl
import json
import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, TextIO

from qwlit.core.errors import ConfigError

PACKAGED = "qwlit:"
DEEPEST = 32
"""Levels of objects and lists in a JSON file of settings or results; more than that exhausts Python's stack."""
MOST_DIGITS = 40
"""Of a whole number; tokenizers state as their longest text one with 31."""
TOO_DEEP = f"it has more than {DEEPEST} levels of objects and lists"


def resolve_path(path: str) -> Path:
    """Turn a setting into a path: `qwlit:demo/train.jsonl` is a file of the package, `~` is the home folder."""
    if path.startswith(PACKAGED):
        return Path(str(resources.files("qwlit") / "resources" / path.removeprefix(PACKAGED)))
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"'{path}': there is no such user, or no home folder") from None


def fsync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text_atomic(path: Path, text: str) -> None:
    """Write a temporary file and rename it to `path`, so that no reader sees half a file and no kill -9 leaves one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


def write_json_atomic(path: Path, value: Any) -> None:
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def append_json_line(path: Path, value: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(value, ensure_ascii=False) + "\n")


def read_text(path: Path) -> str:
    """Read a file that somebody else may have made.

    Raises:
        OSError: it cannot be read, or is no file: a device such as /dev/zero has no end.
        UnicodeDecodeError: it is not UTF-8.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is no file", str(path))
    return path.read_text(encoding="utf-8")


def load_json(text: str) -> Any:
    """Parse a JSON text that somebody else may have written.

    Raises:
        ValueError: it is no JSON, nests deeper than any file needs, or has a number of too many digits.
    """
    try:
        value = json.loads(text, parse_int=_short_int)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    if text.count("[") + text.count("{") > DEEPEST and _is_deeper(value, DEEPEST):
        raise ValueError(TOO_DEEP)
    return value


def _short_int(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number has {len(digits):,} digits")
    return int(digits)


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether objects and lists stand in one another over more than so many levels."""
    level = [value]
    for _ in range(levels):
        nested = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = [child for children in nested for child in children]
    return any(isinstance(each, dict | list) for each in level)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a .jsonl file that qwlit wrote, without a last line that a kill -9 cut off."""
    if not path.is_file():
        return []
    records = []
    # splitlines() would also split at U+2028 and others, which may be inside a JSON string.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if (record := parse_record(line)) is not None:
            records.append(record)
    return records


def parse_record(line: str) -> dict[str, Any] | None:
    """Return the object in a line of a .jsonl file; None if it holds something else."""
    try:
        record = load_json(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a .json file; return an empty one where the file is missing or holds something else."""
    try:
        document = load_json(read_text(path))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


@contextmanager
def locked(
    path: Path, *, blocking: bool = True, shared: bool = False, waiting: Callable[[str], None] | None = None
) -> Iterator[TextIO]:
    """Hold an exclusive or a shared lock on `path` while the block runs; create the file if it is missing.

    The first line of the file names the process that last held it alone.

    Args:
        waiting: called with the name of the process that holds the lock, before this one waits for it.

    Raises:
        BlockingIOError: with `blocking=False`, when another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as handle:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if not blocking:
                raise
            if waiting:
                waiting(lock_holder(path))
            fcntl.flock(handle, kind)
        if not shared:
            handle.truncate(0)
            handle.write(f"{this_process()}\n")
            handle.flush()
        yield handle


def this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def lock_holder(path: Path) -> str:
    """Return the other process that holds the lock on `path`, for a message."""
    word, _, process = path.read_text(encoding="utf-8").partition("\n")[0].partition(" ")
    return f"another process ({process})" if word == "process" else "another process"


def is_locked(path: Path) -> bool:
    """Whether another process holds a lock on `path`."""
    try:
        with locked(path, blocking=False, shared=True):
            return False
    except BlockingIOError:
        return True
