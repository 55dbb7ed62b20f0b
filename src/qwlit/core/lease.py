"""Locks where the file system has no flock, as on some network file systems and in some containers.

A lease is a file beside the locked one, `NAME.lease.1`, `.2`, …; the one with the highest number counts. It names its
holder with host, process id and start time, and the holder touches it every `REFRESH_SECONDS`, until it writes `FREE`
into it. It is free too when its holder has ended, which a process on the same host sees at once; on another host when
nobody has touched it for `STALE_SECONDS` by the clock of the process that waits for it: what the clocks of the hosts
show does not matter, nor whether they are set anew meanwhile.

Whoever finds a lease free creates the file with the next number, which only one process can do, and then looks whether
a higher one is there: the file with the highest number is never removed, so a process that was suspended for any time
between these steps finds it. No file of another process is changed.
"""

import contextlib
import errno
import json
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from qwlit.core.disk import opened_without_links
from qwlit.core.errors import ConfigError
from qwlit.core.streams import say

NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
REFRESH_SECONDS, STALE_SECONDS = 10.0, 60.0
POLL_SECONDS = 0.2
FREE = "free"


@dataclass(frozen=True)
class Holder:
    """Who holds a lease."""

    host: str
    system: str
    """The boot and the namespace in which `pid` is a process: containers and restarts have the same host names."""
    pid: int
    started: int | None
    """Clock ticks from the boot to the start of the process: a later process can have the same id."""
    token: str
    """Different for every lease."""

    @classmethod
    def here(cls) -> "Holder":
        return cls(socket.gethostname(), _system(), os.getpid(), _start_of(os.getpid()), uuid.uuid4().hex)

    @classmethod
    def parse(cls, text: str) -> "Holder | None":
        """Return the holder that a lease names; None where it was cut off while it was written."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def is_elsewhere(self) -> bool:
        return (self.host, self.system) != (socket.gethostname(), _system())

    @property
    def is_running(self) -> bool:
        """Whether the process exists, on this host."""
        is_hidden = self.started is None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            is_hidden = True  # another user's process, of which this one may not see the start
        started = _start_of(self.pid)
        return is_hidden if started is None else started == self.started


def _system() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _start_of(pid: int) -> int | None:
    """Return when the process started; None if it has ended, or the system does not say."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The command stands in brackets and may hold blanks and brackets itself.
    state, *fields = text.rpartition(")")[2].split()
    return None if state == "Z" else int(fields[18])


@contextlib.contextmanager
def lease(path: Path, *, blocking: bool, waiting: Callable[[], object]) -> Iterator[None]:
    """Hold the lease of `path` while the block runs. A process that loses it to another ends at once.

    Args:
        waiting: called once before this process waits for one that runs.

    Raises:
        BlockingIOError: with `blocking=False`, when another process holds it.
    """
    own = json.dumps(asdict(Holder.here()))
    while isinstance(taken := _take(path, own), str):
        if not blocking:
            raise BlockingIOError(errno.EWOULDBLOCK, f"{taken} holds the lease", str(lease_file(path)))
        waiting()
        waiting = _nothing
        time.sleep(POLL_SECONDS)
    ended = threading.Event()
    refreshing = threading.Thread(target=_refresh, args=(path, taken, own, ended), name="lease", daemon=True)
    refreshing.start()
    try:
        yield
    finally:
        ended.set()
        refreshing.join()
        # Where that fails, the others see that this process has ended.
        with contextlib.suppress(OSError):
            if _read(taken)[0] == own:
                with open(taken, "r+b", buffering=0, opener=opened_without_links) as handle:
                    handle.write(FREE.ljust(len(own)).encode())  # in one call, so that nobody reads half of it


def _nothing() -> None:
    """What is called from the second time on."""


def lease_file(path: Path) -> Path:
    """Return the file of the newest lease of `path`; the first name where there is none."""
    return _file(path, max(_numbers(path), default=1))


def _file(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.lease.{number}")


def _numbers(path: Path) -> list[int]:
    """Return the numbers of all leases of `path`, older ones too."""
    prefix = f"{path.name}.lease."
    try:
        names = [file.name for file in path.parent.iterdir()]
    except FileNotFoundError:
        return []
    found = (name.removeprefix(prefix) for name in names if name.startswith(prefix))
    return [int(number) for number in found if number.isdecimal()]


def is_leased(path: Path) -> bool:
    """Whether a process holds the lease of `path`. It does not wait, so for other hosts it compares times of files."""
    file = lease_file(path)
    text, touched = _read(file)
    if text is None or text == FREE:
        return False
    holder = Holder.parse(text)
    if holder is not None and not holder.is_elsewhere:
        return holder.is_running
    now = time.time_ns()
    if abs(now - touched) >= STALE_SECONDS * 1e9:
        # The clock of a file server may show another time than this host's.
        with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=file.parent) as probe:
            now = os.fstat(probe.fileno()).st_mtime_ns
    return abs(now - touched) < STALE_SECONDS * 1e9


def _take(path: Path, own: str) -> Path | str:
    """Take the lease, also from a holder that has ended; return its file, or the name of the holder if that runs."""
    while True:
        number = max(_numbers(path), default=0)
        name, why = _holder(_file(path, number)) if number else ("", "")
        if name and not why:
            return name
        if not _create(file := _file(path, number + 1), own):
            continue
        older = _numbers(path)
        if max(older, default=0) > number + 1:
            file.unlink(missing_ok=True)
            continue
        if name:
            say(f"qwlit: took over {_file(path, number)} from {name}, which {why}")
        for old in older:
            if old <= number:
                _file(path, old).unlink(missing_ok=True)
        return file


def _holder(file: Path) -> tuple[str, str]:
    """Return the name of the holder, "" where the lease is free, and why it can be taken over, "" where it cannot."""
    while True:
        seen = _read(file)
        if seen[0] is None or seen[0] == FREE:
            return "", ""
        holder = Holder.parse(seen[0])
        name = str(holder or "a process")
        if holder is not None and not holder.is_elsewhere:
            return name, "" if holder.is_running else "has ended"
        if not _is_refreshed(file, seen, name):
            return name, f"has not refreshed it for {STALE_SECONDS:g} s"
        if _read(file)[0] == seen[0]:
            return name, ""


def _create(file: Path, text: str) -> bool:
    try:
        with file.open("x", encoding="utf-8") as handle:
            handle.write(text)
    except FileExistsError:
        return False
    except OSError:
        file.unlink(missing_ok=True)
        raise
    return True


def _read(file: Path) -> tuple[str | None, int]:
    """Return the text and when it was touched, in nanoseconds; (None, 0) where there is no lease."""
    try:
        # Opening asks a file server; a path alone may be answered from its cache.
        with open(file, encoding="utf-8", errors="replace", opener=opened_without_links) as handle:
            return handle.read().strip(), os.fstat(handle.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None, 0


def _is_refreshed(file: Path, seen: tuple[str | None, int], name: str) -> bool:
    """Watch the lease of a holder on another host; return whether it changes: that touches it or releases it."""
    _say_once(f"qwlit: {name} holds {file}; waiting up to {STALE_SECONDS:g} s to see whether it still runs")
    end = time.monotonic() + STALE_SECONDS
    while time.monotonic() < end:
        if _read(file) != seen:
            return True
        time.sleep(POLL_SECONDS)
    return False


_say_once = cache(say)


def _refresh(path: Path, file: Path, own: str, ended: threading.Event) -> None:
    """Touch the lease until the block ends. If it belongs to another process now, end this one."""
    while not ended.wait(REFRESH_SECONDS):
        # A file server that does not answer for a while is no loss.
        with contextlib.suppress(OSError):
            is_own = _read(file)[0] == own or (not file.exists() and _create(file, own))
            if is_own and lease_file(path) == file:
                os.utime(file)
            elif not ended.is_set():
                say(f"qwlit: another process took {file}, because this one did not refresh it; this one ends")
                os._exit(ConfigError.exit_code)
