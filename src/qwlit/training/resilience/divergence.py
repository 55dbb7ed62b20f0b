"""Judge from the numbers of the steps whether a run is in trouble, on the host, the same on every rank.

Each rule names its numbers below. `docs/guard.md` says where they come from and what they cost.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

from qwlit.training.resilience.rollback import Cause
from qwlit.training.resilience.spikes import WINDOW

SKIP_WINDOW, MAX_SKIPS = 50, 3
"""So many skipped steps within so many steps are trouble."""
FIRST_STEPS = 3
"""The loss at the start is the median of so many steps."""
SMOOTH_STEPS = 9
"""The smoothed loss is the median of this many steps."""
RISE_FLOOR, RISE_SHARE, RISE_SCALES, RISE_CEILING = 0.3, 0.1, 4.0, 4.0
"""The smoothed loss may rise above its best by the largest of: nats, share of the best, scales of the steps' noise when
the loss was best (a divergence is noisy); by more than the last number of nats, or its share, it may not, whatever the
noise. With steps of one sample the noise is 1 nat and more."""
NOISE_SHARE, NOISE_QUANTILE = 0.9, 1.645
"""The noise is taken from the difference of two steps that so large a share of the differences do not exceed: so many
standard deviations if the noise is normal. The median of the differences would be near 0 where most steps are easy
samples and the others hard ones."""
RISE_STEPS = 12
"""The smoothed loss is above that margin for so many steps in a row."""
END_SHARE, END_SCALES = 0.01, 3.0
"""The last smoothed loss may be above the first by the larger of: share of the first, scales of the steps' noise. The
difference of medians of 9 and 3 steps has a deviation of about 0.8 of that noise. Nor may it be above the loss of the
first step by RISE_CEILING: a run can diverge within 9 steps."""
GROWTH_Z, GROWTH_RATIO, GROWTH_STEPS = 4.0, 4.0, 10
"""The gradient norm is so many scales, and so many times, above its median, for so many steps in a row."""


@dataclass(frozen=True)
class StepNumbers:
    """What the guard knows of a step, of all ranks together."""

    step: int
    """Counted from 1."""
    loss: float
    grad_norm: float
    skipped: bool
    nonfinite: bool
    """Loss or gradient is not finite, and float16's loss scale is not the reason."""
    spike: bool


@dataclass
class DivergenceRules:
    """The rules and what they remember of the steps before."""

    max_nonfinite_steps: int
    nonfinite_in_a_row: int = 0
    skips: deque[int] = field(default_factory=lambda: deque(maxlen=MAX_SKIPS))
    """Newest skipped steps, without float16's overflows."""
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    log_norms: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    first_step: float | None = None
    """The loss of the first step that was finite."""
    first: float | None = None
    """The loss at the start: the median of the first steps."""
    best: float = math.inf
    """The lowest smoothed loss, or the loss at the start, if that is lower."""
    best_noise: float = 0.0
    """The steps' noise at that time."""
    risen_steps: int = 0
    grown_steps: int = 0

    def state_dict(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, deque) else value for name, value in vars(self).items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in vars(self).items():
            # Checkpoints of earlier versions lack some.
            if isinstance(value, deque):
                value.extend(state.get(name, ()))
            elif name != "max_nonfinite_steps":
                setattr(self, name, state.get(name, value))

    @property
    def is_suspicious(self) -> bool:
        """Whether loss or norm is too high, if not yet for long enough."""
        return self.risen_steps > 0 or self.grown_steps > 0

    def update(self, numbers: StepNumbers) -> tuple[str, Cause] | None:
        """Take the numbers of the next step; return what is wrong and its cause, None where nothing is wrong."""
        self.nonfinite_in_a_row = self.nonfinite_in_a_row + 1 if numbers.nonfinite else 0
        if numbers.nonfinite or numbers.spike:
            self.skips.append(numbers.step)
        # A skipped step changes nothing; the rules about skips judge it.
        grown = None if numbers.skipped else self._norm_has_grown(numbers)
        risen = self._loss_has_risen(numbers)
        if too_high := risen or grown:
            return too_high, "divergence"
        # The weights are as before the skipped steps: as long as the other steps' loss has not risen, blame the data.
        cause: Cause = "divergence" if self.risen_steps else "data"
        if self.nonfinite_in_a_row >= self.max_nonfinite_steps:
            return f"loss or gradient not finite {self.nonfinite_in_a_row} times in a row", cause
        if len(self.skips) == MAX_SKIPS and numbers.step - self.skips[0] < SKIP_WINDOW:
            return f"{MAX_SKIPS} of the last {numbers.step - self.skips[0] + 1} steps were skipped", cause
        return None

    def _loss_has_risen(self, numbers: StepNumbers) -> str | None:
        if not math.isfinite(numbers.loss):
            return None
        self.losses.append(numbers.loss)
        self.first_step = numbers.loss if self.first_step is None else self.first_step
        if self.first is None and len(self.losses) == FIRST_STEPS:
            # A learning rate that is far too high has done its damage before a smoothed loss exists.
            self.first = median(self.losses)
        if len(self.losses) < SMOOTH_STEPS:
            return None
        smooth = self.smooth_loss
        if self.first is not None and math.isinf(self.best):
            # A run that diverges before there is a smoothed loss has its lowest one at the start.
            self.best, self.best_noise = self.first, self._noise()
        share = RISE_SHARE * abs(self.best)
        margin = min(max(RISE_FLOOR, share, RISE_SCALES * self.best_noise), max(RISE_CEILING, share))
        self.risen_steps = self.risen_steps + 1 if smooth > self.best + margin else 0
        best = self.best
        if smooth < best:
            self.best, self.best_noise = smooth, self._noise()
        if self.risen_steps < RISE_STEPS:
            return None
        return f"the loss rose from {best:.3g} to {smooth:.3g} and stayed there for {RISE_STEPS} steps"

    @property
    def smooth_loss(self) -> float:
        """The median of the last steps' losses."""
        return median(list(self.losses)[-SMOOTH_STEPS:])

    def _noise(self) -> float:
        """Return the standard deviation of a step's loss, without the trend: that of the differences, / √2."""
        differences = sorted(abs(after - before) for before, after in pairwise(self.losses))
        return differences[int(NOISE_SHARE * len(differences))] / NOISE_QUANTILE / math.sqrt(2)

    def _norm_has_grown(self, numbers: StepNumbers) -> str | None:
        if not (math.isfinite(numbers.grad_norm) and numbers.grad_norm > 0):
            return None
        norm = math.log(numbers.grad_norm)
        known = self.log_norms
        limit = max(GROWTH_Z * _scale(known), math.log(GROWTH_RATIO)) if len(known) >= SMOOTH_STEPS else math.inf
        self.grown_steps = self.grown_steps + 1 if norm > (median(known) if known else 0) + limit else 0
        known.append(norm)
        if self.grown_steps < GROWTH_STEPS:
            return None
        return f"the gradient norm was {GROWTH_RATIO:g} times its median or more for {GROWTH_STEPS} steps"

    def trouble_at_end(self) -> tuple[str, Cause] | None:
        """Return what is wrong after the last step: no step trained, or the last losses are above the first ones."""
        if self.skips and not self.log_norms:
            return "every step was skipped, because loss or gradient was not finite", "data"
        if self.first is None or self.first_step is None:
            return None
        margin = max(END_SHARE * abs(self.first), END_SCALES * self._noise())
        for start, most in ((self.first_step, RISE_CEILING), (self.first, margin)):
            if self.smooth_loss > start + most:
                return f"the loss ends at {self.smooth_loss:.3g}, above its start at {start:.3g}", "divergence"
        return None


def _scale(values: Sequence[float]) -> float:
    """Return the robust standard deviation, see `spikes`."""
    middle = median(values)
    return 1.4826 * median(abs(value - middle) for value in values)
