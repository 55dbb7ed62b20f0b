"""A short training in a process of its own, with a progress bar: for the range test, the pilot and `verify`."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from qwlit.core.console import showing_progress
from qwlit.core.errors import ConfigError, QwlitError
from qwlit.core.signals import answering_signals
from qwlit.training.tracking.run_folder import RunFolder
from qwlit.tuning.trial import JsonlTail, last_message, start_training

POLL_SECONDS = 0.25
Records = Sequence[dict[str, Any]]
LOSSES_ONLY = (
    "train.max_epochs=null",
    "validation.each_epoch=false",
    "validation.every_steps=null",
    "checkpoint.each_epoch=false",
    "checkpoint.every_steps=null",
    "logging.every_steps=1",
    "data.exact_match=0",
    "logger.use=[]",
)
"""Overrides of a run of which only the loss of each step is wanted."""


def run_shortly(
    overrides: list[str],
    run: RunFolder,
    log: Path,
    steps: int,
    title: str,
    screen: Console,
    has_seen_enough: Callable[[Records], bool] = lambda records: False,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Train until the end; return the exit code.

    Args:
        log: gets what the training prints.
        environment: variables beside those of this process.
        has_seen_enough: of the records so far; where it is true, the training is ended with SIGTERM.
    """
    tail = JsonlTail(run.path / "metrics.jsonl")
    log.unlink(missing_ok=True)
    process = start_training(overrides, log, dict(environment or {}))
    with showing_progress(title, screen) as show, answering_signals():
        try:
            while process.poll() is None:
                records = tail.read()
                show(len(records), steps, f"{len(records)} steps")
                if has_seen_enough(records):
                    process.terminate()
                time.sleep(POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    return process.returncode


def failed(what: str, code: int, log: Path) -> QwlitError:
    """Return the error for a short training that ended otherwise than it should, with its exit code and message."""
    error = QwlitError(f"{what}: {last_message(log)}")
    error.exit_code = code if code > 0 else QwlitError.exit_code
    return error


def delete_weights(run: RunFolder) -> None:
    """Delete what a run takes much space for; its records stay."""
    for unneeded in ("checkpoints", "export"):
        shutil.rmtree(run.path / unneeded, ignore_errors=True)


def prepare_folder(folder: RunFolder, own_names: tuple[str, ...], what: str) -> None:
    """Create the folder of several short runs; delete an earlier one of this name, and nothing else.

    Args:
        own_names: how the names in such a folder begin.
        what: it holds, for the message.

    Raises:
        ConfigError: the folder holds something else.
    """
    if folder.path.exists():
        # Runs in it keep their locks and their tokenized data beside them.
        if any(not path.name.startswith((*own_names, ".locks", ".store")) for path in folder.path.iterdir()):
            raise ConfigError(f"{folder.path} exists and is not a {what}; move it away, or set another run.name")
        shutil.rmtree(folder.path)
    folder.path.mkdir(parents=True)
