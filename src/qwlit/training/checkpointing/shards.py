"""Named tensors in safetensors files: whole, or one file per rank with that rank's shard slices (first dimension).

Any number of ranks can read what any other number of ranks wrote: each rank reads the slice that it now holds.
"""

import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from qwlit.core.sharding import local, own_slice_range


def write_shard(folder: Path, stem: str, tensors: dict[str, Tensor], *, rank: int, count: int) -> Path:
    """Write this rank's shard slices of the tensors; return the file."""
    file = folder / (f"{stem}.safetensors" if count == 1 else f"{stem}-{rank + 1:05d}-of-{count:05d}.safetensors")
    save_file(_unshare({name: local(t).detach().contiguous() for name, t in tensors.items()}), file, {"format": "pt"})
    return file


def _unshare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share memory, which safetensors refuses: bitsandbytes' moments share one quantization table."""
    seen: set[int] = set()
    unshared = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        unshared[name] = tensor.clone() if storage in seen and tensor.numel() else tensor
        seen.add(storage)
    return unshared


class ShardReader:
    """Reads tensors that `write_shard` wrote."""

    def __init__(self, folder: Path, stem: str) -> None:
        """Open the files.

        Raises:
            FileNotFoundError: one of them is missing.
            SafetensorError: one is damaged.
        """
        names = re.compile(rf"{stem}(-\d+-of-(?P<count>\d+))?\.safetensors")
        found = [(file, match) for file in sorted(folder.glob(f"{stem}*")) if (match := names.fullmatch(file.name))]
        if not found or len(found) != int(found[0][1]["count"] or 1):
            raise FileNotFoundError(f"{folder} has only {len(found)} of the {stem} files; some are missing")
        self._open = ExitStack()
        self._files: list[Any] = [self._open.enter_context(safe_open(str(file), framework="pt")) for file, _ in found]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def names(self) -> list[str]:
        return list(self._files[0].keys())

    def read(self, name: str) -> Tensor:
        """Return the whole tensor."""
        shards = [file.get_tensor(name) for file in self._files]
        return shards[0] if len(shards) == 1 or shards[0].ndim == 0 else torch.cat(shards)

    def read_slice(self, name: str, first: int, end: int) -> Tensor:
        """Return the tensor from `first` to `end` (excluded) along its first dimension, from the files that have it."""
        parts, start = [], 0
        for file in self._files:
            shard = file.get_slice(name)
            size = shard.get_shape()[0]
            if first < start + size and end > start:
                parts.append(shard[max(first - start, 0) : min(end - start, size)])
            start += size
        return torch.cat(parts) if parts else self._files[0].get_slice(name)[0:0]

    def read_as(self, name: str, template: Tensor) -> Tensor:
        """Return the tensor sharded as `template` is: a DTensor of this rank's shard slice, or the whole tensor."""
        if not isinstance(template, DTensor):
            return self.read(name)
        shard = self.read_slice(name, *own_slice_range(template)).to(template.device)
        # FSDP2 may split unevenly, so from_local needs the full shape; run_check would be a collective.
        return DTensor.from_local(
            shard,
            template.device_mesh,
            template.placements,
            run_check=False,
            shape=template.shape,
            stride=template.stride(),
        )
