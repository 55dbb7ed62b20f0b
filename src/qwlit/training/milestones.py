"""When something is due in a run."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Milestones:
    """The steps, counted from 1, at which something is due."""

    total_steps: int
    validate: Callable[[int], bool]
    """Whether a validation is due after this step."""
    save: Callable[[int], bool]
    log: Callable[[int], bool]

    def next_validation(self, step: int) -> int | None:
        """Return the first step after `step` with a validation due."""
        return next((s for s in range(step + 1, self.total_steps + 1) if self.validate(s)), None)
