"""Locks where the file system has no flock, as on some network file systems and in some containers.

A lease is a file beside the locked one, with host, process id and start time of its holder, who touches it every
`REFRESH_SECONDS`. It is free again when its holder has ended, which a process on the same host sees at once. On another
host it is free when nobody has touched it for `STALE_SECONDS` by the clock of the process that waits for it: what the
clocks of the hosts show does not matter, nor whether they are set anew meanwhile.
"""

import contextlib
import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from qwlit.core.errors import ConfigError
from qwlit.core.streams import say

NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
REFRESH_SECONDS, STALE_SECONDS = 10.0, 60.0
POLL_SECONDS = 0.2
SETTLE_SECONDS = 1.0
"""Two processes that take over a lease at once both wait so long; then the file names one of them."""


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
    file, own = lease_file(path), json.dumps(asdict(Holder.here()))
    while (holder := _take(file, own)) is not None:
        if not blocking:
            raise BlockingIOError(errno.EWOULDBLOCK, f"{holder} holds the lease", str(file))
        waiting()
        waiting = _nothing
        time.sleep(POLL_SECONDS)
    ended = threading.Event()
    refreshing = threading.Thread(target=_refresh, args=(file, own, ended), name="lease", daemon=True)
    refreshing.start()
    try:
        yield
    finally:
        ended.set()
        refreshing.join()
        if _read(file)[0] == own:
            file.unlink(missing_ok=True)


def _nothing() -> None:
    """What is called from the second time on."""


def lease_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.lease")


def is_leased(path: Path) -> bool:
    """Whether a process holds the lease of `path`. For other hosts it compares clocks, and does not wait."""
    text, touched = _read(lease_file(path))
    if text is None:
        return False
    holder = Holder.parse(text)
    if holder is None or holder.is_elsewhere:
        return abs(time.time() - touched / 1e9) < STALE_SECONDS
    return holder.is_running


def _take(file: Path, own: str) -> str | None:
    """Take the lease, also from a holder that has ended; return the name of the holder if that runs."""
    while not _create(file, own):
        seen = _read(file)
        if seen[0] is None:
            continue
        holder = Holder.parse(seen[0])
        name = str(holder or "a process")
        if holder is None or holder.is_elsewhere:
            runs, why = _is_refreshed(file, seen, name), f"has not refreshed it for {STALE_SECONDS:g} s"
        else:
            runs, why = holder.is_running, "has ended"
        now = _read(file)
        if runs and now[0] == seen[0]:
            return name
        if now != seen:
            continue
        file.unlink(missing_ok=True)
        if _create(file, own):
            time.sleep(SETTLE_SECONDS)
            if _read(file)[0] == own:
                say(f"qwlit: took over {file} from {name}, which {why}")
                return None
    return None


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
        with file.open(encoding="utf-8", errors="replace") as handle:
            return handle.read(), os.fstat(handle.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None, 0


def _is_refreshed(file: Path, seen: tuple[str | None, int], name: str) -> bool:
    """Watch the lease of a holder on another host; return whether it changes: that touches it or releases it."""
    say(f"qwlit: {name} holds {file}; waiting up to {STALE_SECONDS:g} s to see whether it still runs")
    end = time.monotonic() + STALE_SECONDS
    while time.monotonic() < end:
        if _read(file) != seen:
            return True
        time.sleep(POLL_SECONDS)
    return False


def _refresh(file: Path, own: str, ended: threading.Event) -> None:
    """Touch the lease until the block ends. If it belongs to another process now, end this one."""
    while not ended.wait(REFRESH_SECONDS):
        # A file server that does not answer for a while is no loss.
        with contextlib.suppress(OSError):
            if _read(file)[0] == own or (not file.exists() and _create(file, own)):
                os.utime(file)
            elif not ended.is_set():
                say(f"qwlit: another process took {file}, because this one did not refresh it; this one ends")
                os._exit(ConfigError.exit_code)
