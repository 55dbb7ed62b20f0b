"""Named tensors in safetensors files: whole, or cut along their first dimension over the ranks that wrote them.

What one number of ranks has written, any other reads: a rank asks for the rows that are its own today.
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
    """Write what this rank holds of the tensors; return the file."""
    file = folder / (f"{stem}.safetensors" if count == 1 else f"{stem}-{rank + 1:05d}-of-{count:05d}.safetensors")
    save_file(_apart({name: local(t).detach().contiguous() for name, t in tensors.items()}), file, {"format": "pt"})
    return file


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give each tensor memory of its own, as the file wants it: all of bitsandbytes' moments share one table."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if storage in seen and tensor.numel() else tensor
        seen.add(storage)
    return apart


class ShardReader:
    """Reads tensors that `write_shard` has written."""

    def __init__(self, folder: Path, stem: str) -> None:
        """Open the files.

        Raises:
            FileNotFoundError: one of them is missing.
            SafetensorError: one is damaged.
        """
        names = re.compile(rf"{stem}(-\d+-of-(?P<count>\d+))?\.safetensors")
        found = [(file, match) for file in sorted(folder.glob(f"{stem}*")) if (match := names.fullmatch(file.name))]
        if not found or len(found) != int(found[0][1]["count"] or 1):
            raise FileNotFoundError(f"{len(found)} files of {stem} in {folder} are not all of them")
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
        """Return the rows from `first` to before `end`, from the files that have them."""
        parts, start = [], 0
        for file in self._files:
            rows = file.get_slice(name)
            size = rows.get_shape()[0]
            if first < start + size and end > start:
                parts.append(rows[max(first - start, 0) : min(end - start, size)])
            start += size
        return torch.cat(parts) if parts else self._files[0].get_slice(name)[0:0]

    def read_like(self, name: str, like: Tensor) -> Tensor:
        """Return the tensor, sharded as `like` is where it is."""
        if not isinstance(like, DTensor):
            return self.read(name)
        rows = self.read_slice(name, *own_slice_range(like)).to(like.device)
        return DTensor.from_local(
            rows, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
