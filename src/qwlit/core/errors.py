"""Errors that end a run in one clear line, each with the exit code that scripts rely on."""

from collections.abc import Iterable
from difflib import get_close_matches


class QwlitError(Exception):
    """Root of qwlit's errors, each one line long. `exit_code` is what the process ends with."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class ConfigError(QwlitError, ValueError):
    """A setting is wrong or cannot be met here. Names the field, the rule and the remedy."""

    exit_code = 2


class DataError(QwlitError, ValueError):
    """The user's data is wrong. Names the file and line, the rule and the remedy."""

    exit_code = 2


class GuardStop(QwlitError, RuntimeError):
    """The guard ended the run: going on would have spoiled the model."""

    exit_code = 3


class Preempted(QwlitError):
    """The machine was asked for back; all is saved and the run goes on when requeued.

    `requeue` says whether a Slurm job is to ask for that itself. True: it was told so. None: only if Slurm wants its
    place for another job, and nobody cancelled it. False: others see to it.
    """

    exit_code = 75

    def __init__(self, message: str, *, requeue: bool | None = None) -> None:
        super().__init__(message)
        self.requeue = requeue


class Pruned(QwlitError):
    """The sweep ended this trial early; all is saved. No failure: after a few of those an agent gives up."""

    exit_code = 0


class Interrupted(QwlitError):
    """The user pressed Ctrl-C; all is saved."""

    exit_code = 130


class SignalExit(BaseException):
    """Raised by a signal handler, wherever the program is: no library's `except Exception` may take it for its own."""

    def __init__(self, error: QwlitError) -> None:
        super().__init__(str(error))
        self.error = error


def one_line(text: str, longest: int | None = None) -> str:
    """Return the text without line breaks, and where it is longer than `longest` with its end cut off."""
    line = " ".join(text.splitlines())
    return line if longest is None or len(line) <= longest else f"{line[: longest - 1]}…"


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the valid name closest to `name`, or an empty string."""
    matches = get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" Did you mean '{matches[0]}'?" if matches else ""
