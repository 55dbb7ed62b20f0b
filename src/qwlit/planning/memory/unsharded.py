"""Bytes that FSDP2 holds unsharded on each device: gathered weights, and gradients until they are reduced.

FSDP2 gathers the weights of a unit into one buffer and copies them out of it. It copies a unit's gradients into one
float32 buffer to reduce them, and keeps this buffer until it reduces the next unit's. `shard_model` makes the units:
each layer, and embedding and head unless they share a weight; what is left is the root.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qwlit.core.patterns import layer_of
from qwlit.model.families import family_of
from qwlit.planning.memory.state import FLOAT32, ShardingAndPrecision

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class UnshardedBytes:
    """What FSDP2 holds at six points of a micro-batch, in its order; everything is 0 without FSDP2."""

    embedding: int = 0
    """While the first weights are gathered: those of the root and of the embedding, and the buffer."""
    head_gather: int = 0
    """While the weight of a head with its own unit is gathered: the root, that weight, and two buffers."""
    head: int = 0
    """While the head computes: the root, the head's weight, and the buffer of the last layer."""
    head_reduction: int = 0
    """When the backward pass of a head with its own unit ends: its gradient, the buffer, and the last layer."""
    layers: int = 0
    """In a layer's backward pass: the root, the layer, the buffer for the layer below, and the gradients of two layers:
    the layer's own, and the float32 buffer of the one above, or of the head."""
    embedding_reduction: int = 0
    """When the backward pass ends: the buffer for the gradient of an embedding with its own unit."""


def unsharded_bytes(
    model: "PreTrainedModel", frozen_dtype: torch.dtype, sharding: ShardingAndPrecision, *, keeps_gradients: bool
) -> UnshardedBytes:
    """Count from the shapes of the units.

    Args:
        model: on the meta device.
        frozen_dtype: that of weights which are not trained.
        keeps_gradients: the unsharded gradients of all units are kept from micro-batch to micro-batch, and are counted
            elsewhere. A unit's buffer then takes the place of its kept gradient.
    """
    if sharding.shards == 1:
        return UnshardedBytes()
    family = family_of(model)
    embedding, head = family.embedding(model).weight, family.head(model).weight
    has_own_units = not family.is_tied(model)

    def gathered(parameter: "nn.Parameter", size: int = FLOAT32) -> int:
        return parameter.numel() * (size if parameter.requires_grad else frozen_dtype.itemsize)

    def gradient(parameter: "nn.Parameter") -> int:
        return parameter.numel() * FLOAT32 if parameter.requires_grad else 0

    root = sum(
        gathered(parameter)
        for name, parameter in model.named_parameters()
        if layer_of(name) is None and not (has_own_units and (parameter is embedding or parameter is head))
    )
    layers = [list(layer.parameters()) for layer in family.layers(model)]
    layer = max((sum(gathered(p, sharding.precision_bytes) for p in each) for each in layers), default=0)
    trained = max((sum(p.numel() for p in each if p.requires_grad) for each in layers), default=0)
    own_gradient, buffer = trained * sharding.precision_bytes, 0 if keeps_gradients else trained * FLOAT32
    head_buffer = 0 if keeps_gradients else gradient(head)
    if not has_own_units:
        return UnshardedBytes(embedding=2 * root, head=root + layer, layers=root + 2 * layer + own_gradient + buffer)
    return UnshardedBytes(
        embedding=root + 2 * gathered(embedding),
        head_gather=root + layer + 2 * gathered(head, sharding.precision_bytes),
        head=root + layer + gathered(head, sharding.precision_bytes),
        head_reduction=root + gradient(head) + head_buffer + 2 * layer,
        layers=root + 2 * layer + own_gradient + max(buffer, head_buffer),
        embedding_reduction=root + (0 if keeps_gradients else max(buffer, gradient(embedding))),
    )
