"""At which steps a run logs, validates and saves. Steps are counted from 1. A run may be long, so no list is stored."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class DueSteps:
    """Steps at a fixed interval, at the end of each epoch, and the last step."""

    total_steps: int
    every_steps: int | None
    next_epoch_end: Callable[[int], int] | None

    def next(self, step: int) -> int | None:
        """Return the first due step after `step`; None after the last one."""
        candidates = [self.total_steps]
        if self.every_steps is not None:
            candidates.append((step // self.every_steps + 1) * self.every_steps)
        if self.next_epoch_end is not None:
            candidates.append(self.next_epoch_end(step))
        first = min(candidates)
        return first if step < first <= self.total_steps else None

    def __contains__(self, step: int) -> bool:
        return self.next(step - 1) == step


@dataclass(frozen=True)
class Milestones:
    """Which of logging, validation and saving is due after a step."""

    total_steps: int
    log_every_steps: int
    saving: DueSteps
    validation: DueSteps | None
    """None: the run never validates."""

    def validate(self, step: int) -> bool:
        return self.validation is not None and step in self.validation

    def save(self, step: int) -> bool:
        return step in self.saving

    def log(self, step: int) -> bool:
        return step == 1 or step % self.log_every_steps == 0 or step == self.total_steps

    def next_validation(self, step: int) -> int | None:
        """Return the first step after `step` that validates; None where no later step does."""
        return None if self.validation is None else self.validation.next(step)
