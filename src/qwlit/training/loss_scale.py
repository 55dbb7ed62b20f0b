"""Loss scaling for float16, in which small gradients would round to zero.

The module multiplies the loss by a large power of two, and the optimizer divides the gradients by it in its own pass.
When a gradient overflows, the step is skipped and the factor halved; after many good steps it is doubled. Unlike the
rest of the step this waits for the device, because the next factor depends on the result of this step.
"""

from dataclasses import dataclass

# The defaults of torch.amp.GradScaler.
INITIAL, GROWTH_STEPS = 2.0**16, 2000
LARGEST = 2.0**24


@dataclass
class LossScale:
    """The factor on the loss; it is the same on all ranks, because all of them have the same gradient norm."""

    factor: float = INITIAL
    good_steps: int = 0
    """Steps since the factor last changed."""

    @property
    def explains_overflow(self) -> bool:
        """Whether the factor can be the reason for a gradient that is not finite."""
        return self.factor > 1.0

    def update(self, *, overflow: bool) -> None:
        """Halve the factor after an overflow; double it after `GROWTH_STEPS` steps without one."""
        if overflow:
            self.factor, self.good_steps = max(1.0, self.factor / 2), 0
        elif self.good_steps + 1 >= GROWTH_STEPS:
            self.factor, self.good_steps = min(LARGEST, self.factor * 2), 0
        else:
            self.good_steps += 1
