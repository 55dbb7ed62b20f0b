"""A short training in a process of its own, with a progress bar: for the range test and the pilot."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from qwlit.core.console import showing_progress
from qwlit.core.signals import answering_signals
from qwlit.training.tracking.run_folder import RunFolder
from qwlit.tuning.trial import JsonlTail, start_training

POLL_SECONDS = 0.25
Records = Sequence[dict[str, Any]]


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
