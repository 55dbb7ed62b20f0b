"""FSDP2: shard every layer's weights, gradients and moments over the devices, along their first dimension."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from qwlit.model.families import family_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from qwlit.model.loss_model import LossModel


def shard_model(model: "LossModel", mesh: "DeviceMesh", *, bf16: bool) -> None:
    """Shard each decoder layer by itself, and embedding, head and final norm together: a tied weight is one.

    Gradients are reduced in float32 after every micro-batch, so that no device keeps an unsharded gradient.

    Args:
        bf16: send the layers' weights around in bfloat16. What is computed in it autocast decides, as without
            sharding: the residual stream, embedding and head stay float32.
    """
    whole = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = replace(whole, param_dtype=torch.bfloat16) if bf16 else whole
    for layer in family_of(model.causal_lm).layers(model.causal_lm):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=whole)
