"""Signals that arrive while this process cannot act on them yet. `training.resilience.preemption` has the overview."""

import signal
from collections.abc import Iterable
from types import FrameType

BY_URGENCY = (0, signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
"""No signal, then the handled signals, least urgent first: Slurm sends SIGTERM after SIGUSR2, and SIGUSR2 must win."""
HANDLED_SIGNALS = BY_URGENCY[1:]
received_signals: list[int] = []
"""Signals that this process received outside the training steps."""


def record_signal(number: int, frame: FrameType | None) -> None:
    """Signal handler that only remembers the signal: `preemption` acts on it as soon as it can."""
    received_signals.append(number)


def most_urgent(numbers: Iterable[int]) -> int:
    """Return the signal that decides how the run ends; 0 for none."""
    return max(numbers, key=BY_URGENCY.index, default=0)


def ignore_signals() -> None:
    """Ignore the handled signals: a helper process, such as a DataLoader worker, ends when the training ends it."""
    for number in HANDLED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
