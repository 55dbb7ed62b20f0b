"""Tensors of which each rank may hold only some rows."""

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local(tensor: Tensor) -> Tensor:
    """Return this rank's rows of a sharded tensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Return all rows; where the tensor is sharded, all ranks must ask together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_slice_range(tensor: Tensor) -> tuple[int, int]:
    """Return the first and the end of this rank's rows."""
    if not isinstance(tensor, DTensor):
        return 0, len(tensor)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return offset[0], offset[0] + shape[0]
