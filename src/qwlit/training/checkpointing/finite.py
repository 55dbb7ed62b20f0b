"""Test that tensors are finite, on their device."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qwlit.core.sharding import local


def find_nonfinite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor with a NaN or an infinity; None where all are finite.

    One fused pass over all tensors, and one wait for the device. Of a sharded tensor it tests this rank's slice.
    """
    own = {name: local(tensor) for name, tensor in tensors.items() if tensor.is_floating_point()}
    own = {name: tensor for name, tensor in own.items() if tensor.numel()}
    # The largest absolute value of all is finite exactly if every value is: torch's maximum keeps NaN.
    if not own or torch.isfinite(nn.utils.get_total_norm(own.values(), torch.inf, foreach=True)):
        return None
    return next((name for name, tensor in own.items() if not torch.isfinite(tensor).all()), None)
