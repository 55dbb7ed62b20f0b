"""Floating-point operations of a training step, counted from the model's shape."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from qwlit.core.patterns import is_a, layer_of
from qwlit.model.families import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Flops:
    """Model FLOPs of a training step, forward and backward. Recomputation does not count, nor
    do positions that the head skips (as in PaLM, Chowdhery et al. 2022, appendix B)."""

    per_token: float
    """Of the decoder's linear layers, but for the last feed-forward block."""
    per_supervised_token: float
    """Of that and the head."""
    per_token_pair: float
    """Of attention, for each query and key that it compares."""

    def of(self, *, num_tokens: int, num_supervised_tokens: int, num_token_pairs: float) -> float:
        return (
            self.per_token * num_tokens
            + self.per_supervised_token * num_supervised_tokens
            + self.per_token_pair * num_token_pairs
        )


def count_flops(model: "PreTrainedModel") -> Flops:
    """Count two FLOPs a multiplication in each of three products: forward, the input's gradient, the weight's.

    The weight's where it is trained; the input's where something in or below the layer is trained.
    """
    family = family_of(model)
    layers = family.layers(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    heights = [-1 if is_a("embedding", name) else layer_of(name) for name in trained]
    lowest = min((height for height in heights if height is not None), default=len(layers))
    head = family.head_weight(model)
    per_supervised_token = 2.0 * head.numel() * (2 + head.requires_grad)
    per_token = per_token_pair = 0.0
    for number, layer in enumerate(layers):
        passes = 2 if number >= lowest else 1
        per_token += _linear_flops(family.attention(layer), passes)
        if layer is layers[-1]:
            per_supervised_token += _linear_flops(family.feed_forward(layer), passes)
        else:
            per_token += _linear_flops(family.feed_forward(layer), passes)
        # Scores and their weighted sum of values; backward has two products for each.
        width = family.attention(layer).head_dim * model.config.num_attention_heads
        per_token_pair += 2 * 2 * width * (2 * passes - 1)
    return Flops(per_token, per_supervised_token, per_token_pair)


def _linear_flops(block: nn.Module, passes: int) -> float:
    """Return what a block's linear layers cost a token, `passes` products and the weights' gradients."""
    linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
    return sum(2.0 * m.in_features * m.out_features * (passes + m.weight.requires_grad) for m in linears)
