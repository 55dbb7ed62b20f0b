"""Standard output and error that are closed or full, or whose terminal has gone: they do not end a run."""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from qwlit.core.errors import CONTROL_CHARACTERS, QwlitError, printable


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


class PrintableStream:
    """A standard stream for texts that somebody else may have written: it writes control characters as escapes.

    The console writes to the stream itself: it escapes texts, and its own sequences make colours and bars.
    """

    def __init__(self, stream: TextIO) -> None:
        self.rich_proxied_file = stream
        """The stream itself; rich knows this name."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)

    def write(self, text: str) -> int:
        # The progress bars of libraries begin with a carriage return.
        shown = text.lstrip("\r")
        self.rich_proxied_file.write("\r" * (len(text) - len(shown)) + printable(shown))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)


def escape_control_characters() -> None:
    """Let nothing that is printed from now on, by whatever library, control the terminal."""
    streams: Any = sys
    for name in ("stdout", "stderr"):
        if not isinstance(stream := getattr(streams, name), PrintableStream):
            setattr(streams, name, PrintableStream(stream))


def say(message: str) -> None:
    """Print a line on standard error, where that is possible."""
    with contextlib.suppress(OSError, ValueError):
        print(printable(message), file=sys.stderr, flush=True)


@contextlib.contextmanager
def without_stderr() -> Iterator[None]:
    """Let what libraries write on standard error while the block runs go to the null device, also from native code."""
    try:
        kept = os.dup(2)
    except OSError:
        yield
        return
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def discard(stream: TextIO) -> None:
    """Let everything that is written to the stream from now on, and what it still holds, go to the null device."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        stream.flush()


def write_json(text: str) -> None:
    """Print JSON that a program reads; control characters in it are written as JSON's escapes.

    Raises:
        QwlitError: standard output cannot be written; a closed pipe raises BrokenPipeError.
    """
    try:
        print(CONTROL_CHARACTERS.sub(lambda found: f"\\u{ord(found[0]):04x}", text))
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
