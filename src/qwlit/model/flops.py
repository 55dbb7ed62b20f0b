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

    They do not include recomputation. The head counts only the label positions, because it computes no others.
    """

    per_token: float
    """FLOPs of the decoder's linear layers, except the last layer's feed-forward block."""
    per_supervised_token: float
    """FLOPs of the last layer's feed-forward block and of the head, which compute the label positions only."""
    per_token_pair: float
    """FLOPs of attention for each pair of a query and a key."""
    recomputed_per_token: float = 0.0
    """FLOPs of the forward pass of all layers that have a backward pass: what activation checkpointing adds with the
    levels full and offload. They are not model FLOPs."""

    def of(self, *, num_tokens: int, num_supervised_tokens: int, num_token_pairs: float) -> float:
        return (
            self.per_token * num_tokens
            + self.per_supervised_token * num_supervised_tokens
            + self.per_token_pair * num_token_pairs
        )


def count_flops(model: "PreTrainedModel") -> Flops:
    """Count the FLOPs of all matrix products: 2 for each multiply-add.

    A linear layer has up to three products: the forward pass, the gradient of the input (if anything in or below the
    decoder layer is trained), and the gradient of the weight (if it is trained).
    """
    family = family_of(model)
    layers = family.layers(model)
    lowest = lowest_trained_layer(model)
    head = family.head(model).weight
    per_supervised_token = 2.0 * head.numel() * (2 + head.requires_grad)
    per_token = per_token_pair = recomputed = 0.0
    for index, layer in enumerate(layers):
        passes = 2 if index >= lowest else 1
        per_token += _linear_flops(family.attention(layer), passes)
        recomputed += (passes - 1) * _forward_flops(layer)
        if layer is layers[-1]:
            per_supervised_token += _linear_flops(family.feed_forward(layer), passes)
        else:
            per_token += _linear_flops(family.feed_forward(layer), passes)
        # Two products: the scores, and the weighted sum of values. The backward pass has two products for each.
        width = family.attention(layer).head_dim * model.config.num_attention_heads
        per_token_pair += 2 * 2 * width * (2 * passes - 1)
    return Flops(per_token, per_supervised_token, per_token_pair, recomputed)


def lowest_trained_layer(model: "PreTrainedModel") -> int:
    """Return the index of the lowest decoder layer with a trained parameter, where the backward pass ends.

    It is -1 if the embedding is trained, and the number of layers if nothing below the final norm is trained.
    """
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    layers = [-1 if is_kind("embedding", name) else layer_of(name) for name in trained]
    return min((layer for layer in layers if layer is not None), default=len(family_of(model).layers(model)))


def _linear_flops(block: nn.Module, passes: int) -> float:
    """Return the FLOPs per token of a block's linear layers: `passes` products and the weights' gradients."""
    linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
    return sum(2.0 * m.in_features * m.out_features * (passes + m.weight.requires_grad) for m in linears)


def _forward_flops(block: nn.Module) -> float:
    """Return the FLOPs per token of the forward pass of a block's linear layers."""
    return sum(2.0 * m.in_features * m.out_features for m in block.modules() if isinstance(m, nn.Linear))
