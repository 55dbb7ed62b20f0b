"""FSDP2: shard every layer's weights, gradients and moments over the devices, along their first dimension."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from qwlit.model.families import family_of

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from qwlit.model.loss_model import LossModel


def shard_model(model: "LossModel", mesh: "DeviceMesh", *, bf16: bool) -> None:
    """Shard each decoder layer by itself; embedding, head and final norm together, because they may share a weight.

    FSDP2 reduces gradients in float32 after every micro-batch, so that no device keeps an unsharded gradient.

    Args:
        bf16: all-gather the layers' weights in bfloat16. Autocast chooses the compute dtype, as without sharding. The
            residual stream and the weights of embedding and head stay float32.
    """
    root_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    layer_policy = replace(root_policy, param_dtype=torch.bfloat16) if bf16 else root_policy
    for layer in family_of(model.causal_lm).layers(model.causal_lm):
        fully_shard(layer, mesh=mesh, mp_policy=layer_policy)
    fully_shard(model, mesh=mesh, mp_policy=root_policy)


def is_sharded(model: "nn.Module") -> bool:
    """Whether each rank holds shard slices only."""
    return isinstance(model, FSDPModule)
