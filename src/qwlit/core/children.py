"""Processes that work for this one, and leave when it is killed."""

import contextlib
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

from qwlit.core.ranks import die_with_parent


def start_child(
    words: list[str], log: Path | None, environment: dict[str, str], *, parent_death_signal: int
) -> subprocess.Popen[bytes]:
    """Start `python words…`; what it says is added to `log`, or shown where there is none.

    Only to be called while this process has no threads: one of them could hold a lock that the child waits for.

    Args:
        environment: the child's, whole.
        parent_death_signal: the signal that it gets when this process is killed.
    """
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") if log else contextlib.nullcontext() as said:
        return subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            env=environment,
            # A Ctrl-C of the terminal's is the parent's to answer.
            start_new_session=True,
            preexec_fn=partial(die_with_parent, os.getpid(), parent_death_signal),  # noqa: PLW1509
        )
