"""When something is due in a run. Steps are counted from 1, and nothing is listed: a run may be of any length."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class DueSteps:
    """Every so many steps, at the end of each epoch, and after the last step."""

    total_steps: int
    every_steps: int | None
    next_epoch_end: Callable[[int], int] | None

    def next(self, step: int) -> int | None:
        """Return the first due step after `step`, None past the end."""
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
    """What is due after a step."""

    total_steps: int
    log_every_steps: int
    saving: DueSteps
    validation: DueSteps | None
    """None: never."""

    def validate(self, step: int) -> bool:
        return self.validation is not None and step in self.validation

    def save(self, step: int) -> bool:
        return step in self.saving

    def log(self, step: int) -> bool:
        return step == 1 or step % self.log_every_steps == 0 or step == self.total_steps

    def next_validation(self, step: int) -> int | None:
        """Return the first step after `step` with a validation due."""
        return None if self.validation is None else self.validation.next(step)
