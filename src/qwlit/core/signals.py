"""Signals that come before anybody can act on them."""

import signal
from collections.abc import Iterable
from types import FrameType

BY_URGENCY = (0, signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
"""None, and what a training answers: Slurm follows its SIGUSR2 by a SIGTERM, and means the first."""
HANDLED_SIGNALS = BY_URGENCY[1:]
received_signals: list[int] = []
"""What this process was sent while it was starting."""


def record_signal(number: int, frame: FrameType | None) -> None:
    """Remember the signal: the training answers it at its first step boundary."""
    received_signals.append(number)


def most_urgent(numbers: Iterable[int]) -> int:
    """Return the signal that says most of what is to be done; 0 for none."""
    return max(numbers, key=BY_URGENCY.index, default=0)


def ignore_signals() -> None:
    """In a process that only helps a training: that one decides when to leave."""
    for number in HANDLED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
