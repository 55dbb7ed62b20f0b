"""Errors that end a run with one line, each with the exit code that scripts rely on."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""All but tab and line break. A terminal would obey them: escape sequences move the cursor and change colours, and the
last two ranges show the text behind them in another direction."""


class QwlitError(Exception):
    """Base class of qwlit's errors; the message is one line, and the process ends with `exit_code`."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class ConfigError(QwlitError, ValueError):
    """A setting is wrong, or this machine cannot meet it. The message names the field, the rule and the remedy."""

    exit_code = 2


class DataError(QwlitError, ValueError):
    """The user's data is wrong. The message names the file and line, the rule and the remedy."""

    exit_code = 2


class GuardStop(QwlitError, RuntimeError):
    """The guard stopped the run, because more steps would have damaged the model."""

    exit_code = 3

    def __init__(self, message: str, *, step: int | None = None) -> None:
        """`step`: the step to look at; None where no step is to blame."""
        super().__init__(message)
        self.step = step


class NotEqual(QwlitError):
    """What was to be proved is not so: the subcommand ran, and its answer is no."""

    exit_code = 4


class Preempted(QwlitError):
    """The scheduler needs the machine; the run is saved and resumes when it is started again.

    `requeue` says whether the process asks Slurm to requeue the job. True: yes. None: only if Slurm itself ends the
    job and nobody cancelled it. False: no, another program starts the run again.
    """

    exit_code = 75

    def __init__(self, message: str, *, requeue: bool | None = None) -> None:
        super().__init__(message)
        self.requeue = requeue


class Pruned(QwlitError):
    """The sweep ended this trial early; the run is saved. Exit code 0: W&B's agent stops after several failed runs."""

    exit_code = 0


class Interrupted(QwlitError):
    """The user pressed Ctrl-C; the run is saved."""

    exit_code = 130


class SignalExit(BaseException):
    """Raised by a signal handler to end the process. It is no `Exception`, so no library's `except` catches it."""

    def __init__(self, error: QwlitError) -> None:
        super().__init__(str(error))
        self.error = error


def reason_of(raised: BaseException) -> BaseException:
    """Return the error for which the process ends: the one that a signal stands for, or the raised one itself."""
    return raised.error if isinstance(raised, SignalExit) else raised


def printable(text: str) -> str:
    """Return text of others for a terminal or a page: control characters become Python escapes, such as \\x1b."""
    return CONTROL_CHARACTERS.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def one_line(text: str, longest: int | None = None) -> str:
    """Return the text without line breaks and control characters, cut to `longest` characters."""
    line = printable(" ".join(text.splitlines()))
    return line if longest is None or len(line) <= longest else f"{line[: longest - 1]}…"


def first_line(error: BaseException) -> str:
    """Return the first line of the error's message; for an error without a message, its type."""
    return (str(error) or type(error).__name__).splitlines()[0]


@contextmanager
def naming_errors(name: Callable[[str], QwlitError]) -> Iterator[None]:
    """Turn whatever a library raises while the block runs into the error that `name` makes of its first line."""
    try:
        yield
    except QwlitError:
        raise
    except BaseException as error:
        # Python's bindings to Rust raise a panic as an error that is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise name(first_line(error)) from None


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the valid name closest to `name`, or an empty string."""
    matches = get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" Did you mean '{matches[0]}'?" if matches else ""
