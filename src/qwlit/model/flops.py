"""Count the floating-point operations of a training step from the model's shape."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from qwlit.core.patterns import is_kind, layer_of
from qwlit.model.families import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Flops:
    """Model FLOPs of a training step, forward and backward, as in PaLM (Chowdhery et al. 2022, appendix B).

    They do not include recomputation, nor the positions that the head skips.
    """

    per_token: float
    """The decoder's linear layers, without the last feed-forward block."""
    per_supervised_token: float
    """The last feed-forward block and the head: both compute the label positions only."""
    per_token_pair: float
    """Attention: each pair of a query and a key."""

    def of(self, *, num_tokens: int, num_supervised_tokens: int, num_token_pairs: float) -> float:
        return (
            self.per_token * num_tokens
            + self.per_supervised_token * num_supervised_tokens
            + self.per_token_pair * num_token_pairs
        )


def count_flops(model: "PreTrainedModel") -> Flops:
    """Count the FLOPs of three matrix products per linear layer, two for each multiplication.

    The three are the forward pass, the gradient of the input (where something in or below the layer is trained), and
    the gradient of the weight (where it is trained).
    """
    family = family_of(model)
    layers = family.layers(model)
    lowest = lowest_trained_layer(model)
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
        # Two products: the scores, and the weighted sum of values. The backward pass has two products for each.
        width = family.attention(layer).head_dim * model.config.num_attention_heads
        per_token_pair += 2 * 2 * width * (2 * passes - 1)
    return Flops(per_token, per_supervised_token, per_token_pair)


def lowest_trained_layer(model: "PreTrainedModel") -> int:
    """Return the lowest layer in or below which something is trained: the backward pass ends there. -1: the embedding.

    It is the number of layers where nothing below the final norm is trained.
    """
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    layers = [-1 if is_kind("embedding", name) else layer_of(name) for name in trained]
    return min((layer for layer in layers if layer is not None), default=len(family_of(model).layers(model)))


def _linear_flops(block: nn.Module, passes: int) -> float:
    """Return the FLOPs per token of a block's linear layers: `passes` products and the weights' gradients."""
    linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
    return sum(2.0 * m.in_features * m.out_features * (passes + m.weight.requires_grad) for m in linears)
