"""Atomic writes, JSON files, file locks, and paths to files of the package."""

import errno
import fcntl
import json
import os
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, TextIO

from qwlit.core.disk import naming_path, opened_without_links, sync
from qwlit.core.errors import ConfigError
from qwlit.core.lease import NO_FLOCK, is_leased, lease
from qwlit.core.streams import say

PACKAGED = "qwlit:"
DEEPEST = 32
"""Levels of objects and lists in a JSON file of settings or results; more than that exhausts Python's stack."""
MOST_DIGITS = 40
"""Of a whole number; tokenizers state as their longest text one with 31."""
MOST_CHARACTERS = 2**25
"""Of a file of settings or results."""
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
        with naming_path(folder):
            sync(descriptor)
    finally:
        os.close(descriptor)


def write_text_atomic(path: Path, text: str) -> None:
    """Write a temporary file and rename it to `path`, so that no reader sees half a file and no kill -9 leaves one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming_path(path):
        try:
            with temporary.open("w", encoding="utf-8") as handle:
                handle.write(text)
                handle.flush()
                sync(handle.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_folder(path.parent)


def write_json_atomic(path: Path, value: Any) -> None:
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def lock_file(folder: Path) -> Path:
    """Return the lock file of a folder, beside it: the name stays locked when the folder is deleted or renamed."""
    return folder.parent / ".locks" / folder.name


@contextmanager
def replacing_folder(folder: Path, *, waits: bool) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `folder` when the block ends; after an error that stays as it was.

    A kill leaves the one or the other, never a part.

    Args:
        waits: wait for another process that replaces the same folder, instead of raising.

    Raises:
        FileExistsError: `folder` is a file, which somebody else made.
        ConfigError: another process replaces it.
    """

    def waiting(holder: str) -> None:
        say(f"qwlit: waiting for {holder}, which writes {folder}")

    with ExitStack() as held:
        try:
            held.enter_context(locked(lock_file(folder), blocking=waits, waiting=waiting))
        except BlockingIOError:
            holder = lock_holder(lock_file(folder))
            raise ConfigError(f"{folder} is being written by {holder}; wait for it, or name another folder") from None
        yield held.enter_context(_replacing_folder(folder))


@contextmanager
def _replacing_folder(folder: Path) -> Iterator[Path]:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))
    partial, old = (folder.with_name(f".{folder.name}.{word}") for word in ("partial", "old"))
    if old.exists() and not folder.exists():
        old.rename(folder)  # killed between the two renames
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        fsync_folder(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def read_small_text(path: Path) -> str:
    """Return the text of a file of settings or results that somebody else may have written.

    Raises:
        OSError: it cannot be read, or is no file: a device such as /dev/zero has no end.
        ValueError: it is larger than such files are, or not UTF-8.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is no file", str(path))
    with path.open(encoding="utf-8") as handle:
        text = handle.read(MOST_CHARACTERS + 1)
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"it has more than {MOST_CHARACTERS:,} characters")
    return text


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
        document = load_json(read_small_text(path))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


@contextmanager
def locked(path: Path, *, blocking: bool = True, waiting: Callable[[str], None] | None = None) -> Iterator[TextIO]:
    """Hold a lock on `path` while the block runs; create the file if it is missing.

    The first line of the file names the process that last held it. Where the file system has no locks, a lease stands
    in for it, see `core.lease`.

    Args:
        waiting: called with the name of the process that holds the lock, before this one waits for it.

    Raises:
        BlockingIOError: with `blocking=False`, when another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8", opener=opened_without_links) as handle, ExitStack() as held:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not blocking:
                raise
            if waiting:
                waiting(lock_holder(path))
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
            held.enter_context(lease(path, blocking=blocking, waiting=lambda: waiting and waiting(lock_holder(path))))
        with naming_path(path):
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
    """Whether another process holds a lock on `path`.

    Raises:
        OSError: it cannot be read.
    """
    try:
        with path.open(encoding="utf-8") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
        return is_leased(path)
    return False
