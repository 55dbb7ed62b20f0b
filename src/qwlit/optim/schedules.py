"""Learning-rate schedules: the lr multiplier as a pure function of the step.

A run has S steps, and W of them are warm-up. Step t = 0 … S-1 trains at `peak_lr * lr_multiplier(t)`:
- in the warm-up, t < W, the multiplier is (t + 1) / W: above 0 in the first step, and 1 in step W - 1;
- then it is the named curve at progress p = (t - W) / (S - W), which starts at 1 and would reach
  `min_lr_ratio` at t = S.
`wsd` (warm-up, stable, decay: Hu et al. 2024) stays at 1 and falls linearly over the last `decay_ratio` of the S steps.
`range_test` rises from `min_lr_ratio` to 1, by the same factor every step (Smith 2017): a sweep uses it to find the
learning rates at which a run is stable.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwlit.optim.config import SchedulerConfig


def cosine(progress: float, floor: float) -> float:
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def linear(progress: float, floor: float) -> float:
    return floor + (1 - floor) * (1 - progress)


def exponential(progress: float, floor: float) -> float:
    return float(floor**progress)


def range_test(progress: float, floor: float) -> float:
    return float(floor ** (1 - progress))


def constant(progress: float, floor: float) -> float:
    return 1.0


DECAYS: dict[str, Callable[[float, float], float]] = {
    "cosine": cosine,
    "linear": linear,
    "exponential": exponential,
    "constant": constant,
    "wsd": linear,
    "range_test": range_test,
}
"""The curve after the warm-up, by the value of scheduler.name: a function of the progress (0 to 1) and the lowest
value."""


@dataclass(frozen=True)
class LearningRateCut:
    """A lower learning rate from a step on, after a warm-up of its own."""

    from_step: int
    factor: float
    warmup_steps: int

    def warmup(self, step: int) -> float:
        """Return the part of the lower learning rate that has been reached, 0 to 1; `step` is not before the cut."""
        return min(1.0, (step - self.from_step + 1) / max(1, self.warmup_steps))


@dataclass(frozen=True)
class Schedule:
    """The lr multiplier at each step of a run."""

    config: "SchedulerConfig"
    total_steps: int
    cuts: tuple[LearningRateCut, ...] = ()
    """What rollbacks multiply the curve by."""

    @cached_property
    def warmup_steps(self) -> int:
        """The warm-up steps, from warmup_steps or warmup_ratio, capped at `max_warmup_ratio` of the run."""
        config = self.config
        steps = config.warmup_steps
        if steps is None:
            steps = round((config.warmup_ratio or 0.0) * self.total_steps)
        return steps if config.max_warmup_ratio == 1 else min(steps, int(config.max_warmup_ratio * self.total_steps))

    def lr_multiplier(self, step: int) -> float:
        cuts = [cut for cut in self.cuts if step >= cut.from_step]
        # Of several warm-ups the latest counts: a run that goes back twice to one step warms up once.
        warmup = cuts[-1].warmup(step) if cuts else 1.0
        return self._curve(step) * math.prod(cut.factor for cut in cuts) * warmup

    def _curve(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        stable = round((1 - self.config.decay_ratio) * self.total_steps) if self.config.name == "wsd" else 0
        start = max(self.warmup_steps, stable)
        progress = (step - start) / max(1, self.total_steps - start)
        return DECAYS[self.config.name](min(max(progress, 0.0), 1.0), self.config.min_lr_ratio)
