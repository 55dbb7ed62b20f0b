"""Signals that come before anybody can act on them."""

import signal
from types import FrameType

ANSWERED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
"""What a training answers."""
noted: list[int] = []
"""What this process was sent while it was starting."""


def note(number: int, frame: FrameType | None) -> None:
    """Remember the signal: the training answers it at its first step boundary."""
    noted.append(number)


def ignore_signals() -> None:
    """In a process that only helps a training: that one decides when to leave."""
    for number in ANSWERED:
        signal.signal(number, signal.SIG_IGN)
