"""Loss scaling for float16, whose smallest gradients would round to zero.

The loss is multiplied by a large power of two, and the optimizer divides it out again inside its one pass. Where a
gradient overflows, the step is skipped and the factor halved; after many good steps it is doubled. Unlike the rest of
the step this waits for the device: the next factor depends on what came of this one.
"""

from dataclasses import dataclass

# The defaults of torch.amp.GradScaler.
INITIAL, GROWTH_STEPS = 2.0**16, 2000
LARGEST = 2.0**24


@dataclass
class LossScale:
    """The factor on the loss, the same on all ranks, because they all see the same gradient norm."""

    factor: float = INITIAL
    good_steps: int = 0
    """Steps since the factor last changed."""

    @property
    def explains_overflow(self) -> bool:
        """Whether a gradient that is not finite may be the factor's doing."""
        return self.factor > 1.0

    def update(self, *, overflow: bool) -> None:
        """Take in what came of a step."""
        if overflow:
            self.factor, self.good_steps = max(1.0, self.factor / 2), 0
        elif self.good_steps + 1 >= GROWTH_STEPS:
            self.factor, self.good_steps = min(LARGEST, self.factor * 2), 0
        else:
            self.good_steps += 1
