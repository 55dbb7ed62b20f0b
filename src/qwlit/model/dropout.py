"""Dropout for models that have none of their own: on attention weights and on feed-forward outputs."""

from functools import partial
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from qwlit.model.config import DropoutConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def apply_dropout(model: "PreTrainedModel", dropout: DropoutConfig) -> None:
    """Set both probabilities in every decoder layer. They act in training mode only, from torch's default generator.

    At 0 the layers stay exactly as they were, without a hook. LoRA's dropout belongs to its adapters.
    """
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = dropout.attention
        if dropout.feed_forward:
            layer.mlp.register_forward_hook(partial(_drop, probability=dropout.feed_forward))


def _drop(module: nn.Module, args: object, output: Tensor, *, probability: float) -> Tensor:
    return F.dropout(output, probability, training=module.training)
