"""FSDP2: shard every layer's weights, gradients and moments over the devices, along their first dimension."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from qwlit.model.families import family_of

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from qwlit.model.loss_model import LossModel


def shard_model(model: "LossModel", mesh: "DeviceMesh", *, bf16: bool) -> None:
    """Shard each decoder layer by itself, and embedding and head too unless they share a weight.

    FSDP2 reduces gradients in float32, when `CausalLMModule` says so: in every micro-batch or in the last one. A shared
    weight stays unsharded from the embedding's forward pass to the end of the backward pass; the other ones are
    unsharded while they are read.

    Args:
        bf16: all-gather the weights of layers and head in bfloat16. Autocast chooses the compute dtype, as without
            sharding. The residual stream and the weights of the embedding and of the final norm stay float32.
    """
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    bf16_policy = replace(policy, param_dtype=torch.bfloat16) if bf16 else policy
    family = family_of(model.causal_lm)
    for layer in family.layers(model.causal_lm):
        fully_shard(layer, mesh=mesh, mp_policy=bf16_policy)
    if not family.is_tied(model.causal_lm):
        embedding, head = family.embedding(model.causal_lm), family.head(model.causal_lm)
        fully_shard(embedding, mesh=mesh, mp_policy=policy)
        fully_shard(head, mesh=mesh, mp_policy=bf16_policy)
        register_fsdp_forward_method(head, "loss")
        for module in (embedding, head):
            # Their backward passes do not read the weight: the head computes its gradients in the forward pass.
            module.set_unshard_in_backward(False)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def unshard_head(head: "nn.Module") -> None:
    """Gather the weight of a head that is sharded by itself.

    FSDP2 would gather it without this call too, but then keep the collective's output, which is as large as the
    weight, until the forward pass ends.
    """
    if isinstance(head, FSDPModule):
        head.unshard()


def is_sharded(model: "nn.Module") -> bool:
    """Whether each rank holds shard slices only."""
    return isinstance(model, FSDPModule)
