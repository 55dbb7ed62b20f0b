"""Named tensors in safetensors files: whole, or one file per rank with that rank's shard slices (first dimension).

Any number of ranks can read what any other number of ranks wrote: each rank reads the slice that it now holds.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from qwlit.core.disk import naming_path, sync
from qwlit.core.sharding import own_slice_range, sharded_as

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The names in a safetensors header, https://huggingface.co/docs/safetensors (format)."""


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a file and sync it to the disk; return its bytes and sha256, computed while it is written."""
    sha256, size = hashlib.sha256(), 0
    with naming_path(path), path.open("wb") as handle:
        for piece in pieces:
            handle.write(piece)
            sha256.update(piece)
            size += len(piece)
        handle.flush()
        sync(handle.fileno())
    return {"bytes": size, "sha256": sha256.hexdigest()}


def safetensors_pieces(
    tensors: Mapping[str, Tensor], read: Callable[[str], Tensor] | None = None
) -> Iterable[bytes | memoryview]:
    """Yield the content of a safetensors file piece by piece: the library itself has no hash and wants all tensors.

    Args:
        read: returns the values of a tensor when they are due; `tensors` may then be on the meta device.
    """
    # The format wants no gaps. Wide dtypes first keep every tensor aligned.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    yield len(encoded).to_bytes(8, "little") + encoded
    for name, tensor in ordered:
        if tensor.numel():
            yield (
                (read(name) if read else tensor).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            )


class ShardReader:
    """Reads tensors from the files of one stem."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Open the files, given in the order of their slices.

        Raises:
            FileNotFoundError: one of them is missing.
            SafetensorError: one is damaged.
        """
        self._open = ExitStack()
        self._files: list[Any] = []
        for file in files:
            with naming_path(file):
                # safetensors says of every file that it cannot open that there is none.
                file.open("rb").close()
                self._files.append(self._open.enter_context(safe_open(str(file), framework="pt")))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def names(self) -> list[str]:
        return list(self._files[0].keys())

    def shape(self, name: str) -> list[int]:
        """Return the shape of the whole tensor."""
        shapes: list[list[int]] = [file.get_slice(name).get_shape() for file in self._files]
        return [sum(shape[0] for shape in shapes), *shapes[0][1:]] if shapes[0] else []

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

    def read_of_rank(self, name: str, rank: int) -> Tensor:
        """Return what this rank has written under the name."""
        tensor: Tensor = self._files[rank].get_tensor(name)
        return tensor

    def read_as(self, name: str, template: Tensor | None, *, to_host: bool = False) -> Tensor:
        """Return the tensor sharded as `template` is: a DTensor of this rank's shard slice, or the whole tensor.

        Args:
            to_host: the slice is in the host's memory; else it is on the template's device.
        """
        if not isinstance(template, DTensor):
            return self.read(name)
        shard = self.read_slice(name, *own_slice_range(template))
        return sharded_as(template, shard if to_host else shard.to(template.device))
