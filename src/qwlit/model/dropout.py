"""Add dropout to models that have none, with hooks on their blocks (a probability of 0 adds no hook), and NEFTune."""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwlit.core.batch import MicroBatch
from qwlit.core.patterns import layer_of, names_in_layers
from qwlit.model.config import DropoutConfig
from qwlit.model.families import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def apply_dropout(model: "PreTrainedModel", dropout: DropoutConfig) -> None:
    """Set all probabilities except LoRA's, which `apply_adapter` sets. Dropout acts in training mode only.

    It draws from torch's default generator, which the training seeds for each micro-batch.

    Raises:
        ConfigError: the model does not have the layers of `dropout.layers`.
    """
    family = family_of(model)
    layers = family.layers(model)
    names = [f"layers.{index}." for index in range(len(layers))]
    chosen = names if dropout.layers is None else names_in_layers(names, dropout.layers, field="dropout.layers")
    for name in chosen:
        layer = layers[layer_of(name)]
        family.attention(layer).attention_dropout = dropout.attention
        _drop_before(family.feed_forward_output(layer), dropout.feed_forward)
        for block in (family.attention(layer), family.feed_forward(layer)):
            _drop_after(block, dropout.residual)
    _drop_after(family.embedding(model), dropout.embedding)


def add_neftune_noise(embedded: Tensor, micro: MicroBatch, alpha: float) -> Tensor:
    """Add uniform noise to the embedded tokens (B, T, D), see `dropout.neftune_alpha`.

    It draws from torch's default generator, as dropout does.
    """
    _, T, D = embedded.shape
    lengths = micro.sample_lengths
    if micro.cu_seqlens is not None:
        # Packed: one row with the length of each token's own sample. `output_size` saves a wait for the device.
        lengths = lengths.repeat_interleave(lengths, output_size=T)
    largest = alpha / (lengths * D).sqrt().view(len(embedded), -1, 1)  # (1, T, 1) packed, (B, 1, 1) padded
    return embedded + (torch.empty_like(embedded).uniform_(-1, 1) * largest).to(embedded.dtype)


def _drop_before(module: nn.Module, probability: float) -> None:
    if probability:
        module.register_forward_pre_hook(partial(_drop_input, probability=probability))


def _drop_after(module: nn.Module, probability: float) -> None:
    if probability:
        module.register_forward_hook(partial(_drop_output, probability=probability))


def _drop_input(module: nn.Module, inputs: tuple[Tensor], *, probability: float) -> tuple[Tensor]:
    return (F.dropout(inputs[0], probability, training=module.training),)


def _drop_output(module: nn.Module, inputs: object, output: Any, *, probability: float) -> Any:
    """Apply dropout to the hidden states. Attention returns a tuple of them and its weights."""
    if isinstance(output, tuple):
        return (F.dropout(output[0], probability, training=module.training), *output[1:])
    return F.dropout(output, probability, training=module.training)
