"""Signals that come before anybody can act on them."""

from types import FrameType

noted: list[int] = []
"""What this process was sent while it was starting."""


def note(number: int, frame: FrameType | None) -> None:
    """Remember the signal: the training answers it at its first step boundary."""
    noted.append(number)
