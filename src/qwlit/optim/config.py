"""What a user can set about the optimizer and the learning rate."""

from typing import Annotated, Literal

from pydantic import Field

from qwlit.core.schema import (
    Flag,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    Probability,
    Ratio,
    config_dataclass,
)


@config_dataclass
class OptimConfig:
    """AdamW (Loshchilov & Hutter 2019), fused."""

    lr: PositiveFloat
    """Peak learning rate, reached after warm-up."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay, applied as lr * weight_decay * weight."""
    betas: Annotated[tuple[Probability, Probability], Field(strict=False)] = (0.9, 0.999)
    """Decay rates of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the square root of the second moment."""
    amsgrad: Flag = False
    """Use the largest second moment seen so far (Reddi et al. 2018)."""
    no_decay: tuple[Literal["bias", "norm"], ...] = ()
    """Kinds of parameters without weight decay: biases, normalization weights."""


@config_dataclass
class SchedulerConfig:
    """The learning rate as a function of the step: linear warm-up, then the named decay to the run's end."""

    name: Literal["cosine", "linear", "exponential", "constant"]
    """cosine: smooth, long runs. linear: short runs. exponential: fast decay, small data. constant: no decay."""
    warmup_steps: NonNegativeInt | None = None
    """Warm-up in steps. Typing it clears the recipe's warmup_ratio; typing both is an error."""
    warmup_ratio: Ratio | None = None
    """Warm-up as a share of the run; 0.05 to 0.2 is recommended."""
    max_warmup_ratio: Ratio = 1.0
    """Warm-up steps are capped at this share of the run; recipes set 0.2; what you type is not capped."""
    min_lr_ratio: Ratio = 0.0
    """Learning rate at the end of the run, as a share of the peak. Exponential decay needs it above 0."""
