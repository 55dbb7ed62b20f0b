"""Child processes that end when this process is killed."""

import contextlib
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

from qwlit.core.ranks import die_with_parent


def start_child(
    arguments: list[str], log: Path | None, environment: dict[str, str], *, parent_death_signal: int
) -> subprocess.Popen[bytes]:
    """Start `python arguments…`; append its output to `log`, or show it where `log` is None.

    Call this only while this process has no threads: a thread could hold a lock that the forked child then waits for.

    Args:
        environment: all environment variables of the child.
        parent_death_signal: the signal that the kernel sends to the child when this process is killed.
    """
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") if log else contextlib.nullcontext() as output:
        return subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            # In a session of its own the child gets no Ctrl-C from the terminal: the parent handles it.
            start_new_session=True,
            preexec_fn=partial(_prepare, os.getpid(), parent_death_signal),  # noqa: PLW1509
        )


def _prepare(parent: int, parent_death_signal: int) -> None:
    """In the child, before it becomes the other program."""
    die_with_parent(parent, parent_death_signal)
    # The parent may ignore Ctrl-C (`&` in a script), but the child's comes from the parent.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
