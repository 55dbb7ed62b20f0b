"""The four levels of activation checkpointing, from keeping everything to keeping almost nothing.

A level decides what a layer keeps of its forward pass for the backward pass. `none` keeps everything. `selective` keeps
the results of matrix products and attention and computes the rest (norms, activations, rotations) again. `full` keeps
one hidden state per layer and computes the layer again. `offload` is `full` with the hidden states in the host's
memory. The gradients are the same on every level.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from qwlit.model.config import ActivationCheckpointing
from qwlit.model.families import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

aten = torch.ops.aten
# Operators whose results are expensive to compute and small. Not eager attention's batched products: their results grow
# with the square of the length.
KEPT = {
    aten.mm.default,
    aten.addmm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def apply_activation_checkpointing(model: "PreTrainedModel", level: ActivationCheckpointing) -> None:
    """Set what every decoder layer keeps in training mode. Call it before compiling and sharding."""
    if level == "none":
        return
    functions = {"selective": _selective, "full": _full, "offload": _offload}
    for layer in family_of(model).layers(model):
        # transformers' own switch. It checkpoints `forward` only, so hooks such as FSDP2's do not run a second time.
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functions[level]


_full = partial(checkpoint, use_reentrant=False)


def _selective(layer: Callable[..., Any], *inputs: Any) -> Any:
    return checkpoint(layer, *inputs, use_reentrant=False, context_fn=_contexts)


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_keep)


def _keep(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operation in KEPT or operation.name().startswith("torch_attn::_varlen_attn")
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _offload(layer: Callable[..., Any], *inputs: Any) -> Any:
    on_cuda = any(isinstance(value, torch.Tensor) and value.is_cuda for value in inputs)
    with save_on_cpu(pin_memory=on_cuda):
        return _full(layer, *inputs)
