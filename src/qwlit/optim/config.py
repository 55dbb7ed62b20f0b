"""Settings of the optimizer and the learning rate."""

from typing import Annotated, Literal

from pydantic import Field

from qwlit.core.schema import (
    Flag,
    LayerRange,
    NonNegativeFloat,
    NonNegativeInt,
    OneOrMore,
    PositiveFloat,
    Probability,
    Ratio,
    config_dataclass,
    key_of,
)
from qwlit.optim.kinds import OPTIMIZERS
from qwlit.optim.schedules import DECAYS

OptimizerName = Annotated[str, key_of(OPTIMIZERS)]


@config_dataclass
class GroupRule:
    """The learning rate or weight decay of some parameters. If several rules match a parameter, the first counts."""

    match: str
    """bias, norm, embedding, head, attention, mlp, a part of the name (q_proj) or a glob (model.layers.*.weight)."""
    layers: LayerRange | None = None
    """First and last decoder layer, from 0; null: all."""
    lr: PositiveFloat | None = None
    """Peak learning rate of these parameters."""
    lr_multiplier: PositiveFloat | None = None
    """Instead of lr: multiplies the learning rate that these parameters would have."""
    weight_decay: NonNegativeFloat | None = None
    """Weight decay of these parameters; it overrides no_decay."""


@config_dataclass
class OptimConfig:
    """The optimizer and its parameter groups."""

    name: OptimizerName = "adamw"
    """adamw: Loshchilov & Hutter 2019. muon: orthogonalized momentum for the matrices between embedding and head
    (Jordan 2024; scaled to AdamW's learning rates as in Liu et al. 2025), AdamW for the rest. sgd: with momentum.
    adamw_8bit, paged_adamw, paged_adamw_8bit: bitsandbytes."""
    lr: PositiveFloat
    """Peak learning rate, reached after warm-up."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay, applied as lr * weight_decay * weight (sgd: added to the gradient)."""
    betas: Annotated[tuple[Probability, Probability], Field(strict=False)] = (0.9, 0.999)
    """Exponential decay rates of AdamW's first and second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the square root of AdamW's second moment."""
    amsgrad: Flag = False
    """adamw: use the largest second moment seen so far (Reddi et al. 2018)."""
    momentum: Probability = 0.95
    """Momentum of muon and sgd."""
    nesterov: Flag = True
    """muon and sgd: use Nesterov momentum."""
    no_decay: Annotated[tuple[Literal["bias", "norm", "embedding"], ...], OneOrMore] = ()
    """Kinds of parameters without weight decay: biases, normalization weights, the embedding."""
    groups: tuple[GroupRule, ...] = ()
    """Rules for parameters with a learning rate or weight decay of their own, [{match: norm, lr: 1e-5},…]."""
    layer_lr_decay: Annotated[float, Field(gt=0, le=1, strict=True)] = 1.0
    """Multiplies the learning rate from each decoder layer to the layer below it; the embedding is below all layers
    (ULMFiT's discriminative fine-tuning, as in ELECTRA). 1: the same for all layers."""
    lora_plus_ratio: PositiveFloat = 1.0
    """Multiplies the learning rate of LoRA's B matrices (LoRA+, Hayou et al. 2024; they advise 16). 1: as A's."""


@config_dataclass
class SchedulerConfig:
    """The learning rate as a function of the step: linear warm-up, then the named decay to the run's end."""

    name: Annotated[str, key_of(DECAYS)]
    """cosine: smooth, long runs. linear: short runs. exponential: fast decay, small data. constant: no decay. wsd:
    constant, then linear over the last decay_ratio of the run. range_test: rises exponentially; `sweep` uses it."""
    warmup_steps: NonNegativeInt | None = None
    """Warm-up in steps. Setting it clears the recipe's warmup_ratio; setting both is an error."""
    warmup_ratio: Ratio | None = None
    """Warm-up as a share of the run; 0.05 to 0.2 is recommended."""
    max_warmup_ratio: Ratio = 1.0
    """Warm-up steps are capped at this share of the run; recipes set 0.2; an override of the warm-up is not capped."""
    decay_ratio: Annotated[float, Field(gt=0, le=1, strict=True)] = 0.2
    """wsd: share of the run in which the learning rate falls. 0.2 matches cosine (Hägele et al. 2024)."""
    min_lr_ratio: Ratio = 0.0
    """Learning rate at the end of the run (range_test: at its start), as a share of the peak. exponential and
    range_test need it above 0."""
