"""Standard output and error that are closed or full, or whose terminal has gone: they do not end a run."""

import contextlib
import os
import sys
from typing import TextIO

from qwlit.core.errors import QwlitError


def open_closed_streams() -> None:
    """Open the null device in place of closed standard streams (`>&-`): else the next opened file gets their number.

    Libraries and child processes would then print into that file.
    """
    closed = []
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            closed.append(number)
            # The system takes the lowest free number, which is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115, PTH123 - open until the process ends
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115, PTH123
    if 1 in closed:
        say("qwlit: standard output is closed, so nothing is shown")


def say(message: str) -> None:
    """Print a line on standard error, where that is possible."""
    with contextlib.suppress(OSError, ValueError):
        print(message, file=sys.stderr, flush=True)


def discard(stream: TextIO) -> None:
    """Let everything that is written to the stream from now on, and what it still holds, go to the null device."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        stream.flush()


def write_out(text: str) -> None:
    """Print a line that a program reads.

    Raises:
        QwlitError: standard output cannot be written; a closed pipe raises BrokenPipeError.
    """
    try:
        print(text)
    except BrokenPipeError:
        raise
    except OSError as error:
        discard(sys.stdout)
        raise QwlitError(f"standard output cannot be written: {error.strerror}") from None


def finish_stdout() -> None:
    """Write out what standard output still holds.

    Raises:
        QwlitError: it cannot be written; not for a closed pipe, whose reader has read enough.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        discard(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            raise QwlitError(f"standard output cannot be written: {error.strerror}") from None
