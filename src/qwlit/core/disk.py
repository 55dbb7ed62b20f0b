"""Errors of the operating system at files and folders, as one line that says what to free or mend."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwlit.core.errors import ConfigError

REMEDIES = {
    errno.ENOSPC: "free disk space",
    errno.EDQUOT: "free space in your quota",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
    errno.EROFS: "make the file system writable",
    errno.EACCES: "give this user the right to read and write it",
    errno.EPERM: "give this user the right to read and write it",
    errno.EIO: "check the disk",
    errno.ESTALE: "mount the file system again",
    errno.ENOENT: "put back what was removed or renamed",
    errno.ENOTDIR: "a file or a link has the name of a folder: move it away",
    errno.EEXIST: "move away what has this name",
    errno.ENOTEMPTY: "move away what has this name",
    errno.EISDIR: "a folder has the name of a file: move it away",
    errno.ELOOP: "a link has this name, or links point to each other: remove them",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.ENFILE: "allow more open files on this machine",
    errno.ENOMEM: "free memory",
}
OF_THE_FILE = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.ENODEV),
    *(errno.EIO, errno.EBADMSG, errno.EUCLEAN),
)
"""Errors that say that this file is gone, replaced, or on a bad sector. After any other one it may be good: the process
lacks memory, open files or rights, or the file server does not answer."""
NOT_SYNCABLE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
"""What fsync answers where a file system does not have it: some have none for folders."""
OF_RUST = re.compile(r"\(os error (\d+)\)")
"""How libraries in Rust name an error of the operating system: they raise other types than OSError."""


def remedy_of(error: OSError) -> str:
    """Return what to free or mend."""
    return REMEDIES.get(error.errno or 0, "mend that")


def reason_of_disk(error: OSError) -> str:
    """Return what the operating system says."""
    return error.strerror or str(error)


def disk_line(error: OSError) -> str:
    """Return the file, the reason and the remedy."""
    if error.errno == errno.ENOENT and error.filename is None and not _has_current_folder():
        return "the current folder was removed; change to one that exists (cd)"
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    return f"{' → '.join(names)}: {reason_of_disk(error)}; {remedy_of(error)}".removeprefix(": ")


def _has_current_folder() -> bool:
    try:
        Path.cwd()
    except FileNotFoundError:
        return False
    return True


@contextmanager
def explaining_disk_errors() -> Iterator[None]:
    """Turn an error of the operating system that nothing else has answered into one line.

    Raises:
        ConfigError: in its place; a closed pipe raises BrokenPipeError.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno is None:
            raise
        raise ConfigError(f"{disk_line(error)} and run the same command again") from error


@contextmanager
def naming_path(path: Path) -> Iterator[None]:
    """Name `path` in an error: a failed write or sync names no file, a temporary file has another name.

    Raises:
        OSError: with the path, also where a library in Rust raised an error of another type.
    """
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
    except Exception as error:
        if not (found := OF_RUST.search(str(error))):
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def opened_without_links(path: str, flags: int) -> int:
    """An `opener` for `open`: a link that somebody else put in place of a file is an error, not followed."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def sync(descriptor: int) -> None:
    """Write a file or a folder to the disk, where its file system can do that.

    Raises:
        OSError: the disk failed.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_SYNCABLE:
            raise
