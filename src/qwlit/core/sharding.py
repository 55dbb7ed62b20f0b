"""Tensors that FSDP2 may have sharded: each rank then holds one shard slice along the first dimension."""

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard slice of a sharded tensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds a shard slice only."""
    return isinstance(tensor, DTensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole tensor. For a sharded tensor this is a collective: all ranks must call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_slice_range(tensor: Tensor) -> tuple[int, int]:
    """Return where this rank's shard slice starts and ends along the first dimension (end excluded)."""
    if not isinstance(tensor, DTensor):
        return 0, len(tensor)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return offset[0], offset[0] + shape[0]


def fewest_rows(num_rows: int, count: int) -> int:
    """Return the rows of the smallest shard slice, the last one, of `num_rows` over `count` ranks.

    Each rank before it has num_rows / count, rounded up, so the last ones may have none.
    """
    return max(0, num_rows - (count - 1) * -(-num_rows // count))


def smallest_slice(tensor: Tensor) -> int:
    """Return the elements of the smallest shard slice that a rank has of this tensor; of a whole one all of them."""
    count = tensor.device_mesh.size() if isinstance(tensor, DTensor) else 1
    return fewest_rows(len(tensor), count) * (tensor.numel() // len(tensor))


def sharded_as(template: Tensor, own_slice: Tensor) -> Tensor:
    """Return a tensor sharded as `template` is; `own_slice` may be on another device, as with FSDP2's CPU offload."""
    assert isinstance(template, DTensor)
    # from_local would move the slice to the mesh's device, and FSDP2 may split unevenly.
    return DTensor(own_slice, template._spec, requires_grad=False)


def copy_own_slice(target: Tensor, whole: Tensor) -> None:
    """Copy this rank's shard slice of `whole` into `target`."""
    first, end = own_slice_range(target)
    local(target).copy_(whole[first:end])
