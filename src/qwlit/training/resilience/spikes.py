"""Find steps whose gradient norm or loss is far above that of the steps before, on the device.

The rule is a robust z-score: a value's distance from the median of the last WINDOW accepted steps, over their scale,
1.4826 times the median absolute deviation (Iglewicz and Hoaglin 1993; the factor makes it the standard deviation of
normal noise). Unlike mean and deviation, both ignore single outliers.
"""

import math

import torch
from torch import Tensor

WINDOW = 128
"""Accepted steps that a step is compared with."""
FEWEST = 10
"""The rule needs this many; before that only values that are not finite are skipped."""
Z_LIMIT = 6.0
SCALE_FLOOR = 0.15
"""Smallest scale, of the log of the norm and of the loss in nats: a quiet run must not skip harmless steps."""
LOG_RATIO = (math.log(5.0), math.log(10.0))
"""A norm spike is above 5 times the median in any case, and the scale alone asks for no more than 10 times: so a noisy
history hides no spike of 30 times."""
TAIL_MARGIN, TAIL_LIMIT = (math.log(2.0), 1.0), (math.log(20.0), 4.0)
"""Of the log of the norm and of the loss. A spike is also so far above the highest accepted step, up to a distance of
the second numbers from the median: a few hard samples among easy ones, in steps of one or two samples, are far above
the median again and again, and no scale shows that before half of the steps are such."""


class SpikeDetector:
    """Compares each step with the accepted steps before it. All ranks have the same numbers and decide alike."""

    def __init__(self) -> None:
        self.history: Tensor | None = None
        """(2, WINDOW) float32: log of the gradient norm and loss of the accepted steps, newest last, NaN where there
        are fewer."""

    def load(self, history: Tensor) -> None:
        """Continue with the history of a checkpoint.

        Raises:
            ValueError: it has another shape.
        """
        if history.shape != (2, WINDOW):
            raise ValueError(f"the history of norms has the shape {tuple(history.shape)}")
        self.history = history

    def judge(self, grad_norm: Tensor, loss: Tensor) -> Tensor:
        """Return 1.0 where this step is a spike, a float32 scalar; a step that is finite and no spike is accepted.

        Args:
            grad_norm: total norm over all ranks, before clipping.
            loss: of the step, over all ranks, in nats per supervised token.
        """
        values = torch.stack([grad_norm.float().log(), loss.float()])
        history = self.history
        if history is None:
            history = torch.full((2, WINDOW), torch.nan)
        history = history.to(values.device)
        accepted = history.isfinite()
        count = accepted[0].sum()
        median = _median(history, count)
        scale = (1.4826 * _median((history - median[:, None]).abs(), count)).clamp(min=SCALE_FLOOR)
        limit = Z_LIMIT * scale
        # Row 0 is the norm's: a ratio is a difference of logs.
        limit = torch.stack([limit[0].clamp(*LOG_RATIO), limit[1]])
        margin, most = values.new_tensor([TAIL_MARGIN, TAIL_LIMIT])
        highest = history.nan_to_num(-torch.inf).amax(dim=1)
        limit = torch.maximum(limit, torch.minimum(highest - median + margin, most))
        finite = values.isfinite().all()
        spike = ((values - median) > limit).any() & finite & (count >= FEWEST)
        shifted = torch.cat([history[:, 1:], values[:, None]], dim=1)
        # A skipped step is not inserted: a burst of spikes must not become the new normal.
        self.history = torch.where(finite & ~spike, shifted, history)
        return spike.float()


def _median(rows: Tensor, count: Tensor) -> Tensor:
    """Return the median of each row's first `count` values in ascending order; sorting puts NaN last."""
    # torch.nanmedian has no deterministic kernel on CUDA.
    ordered = rows.sort(dim=1).values
    middle = torch.stack([(count - 1) // 2, count // 2]).clamp(min=0).expand(len(rows), 2)
    return ordered.gather(1, middle).mean(1)
