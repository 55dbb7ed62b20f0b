"""Copies between a device and the host's memory that run beside the computation."""

import torch
from torch import Tensor


class Copies:
    """Copies where device and host share the memory: each one is done when `copy` returns."""

    def allocate(self, num_elements: int) -> Tensor:
        """Return uninitialized float32 memory of the host, (num_elements,)."""
        return torch.empty(num_elements)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy after everything that the current stream was given before; what it is given later does not wait.

        The caller keeps both tensors, and writes neither of them, until it has waited for the copy.
        """
        target.copy_(source)

    def wait_on_host(self) -> None:
        """Let the host wait until all copies are done."""

    def wait_on_device(self) -> None:
        """Let what the current stream is given from now on wait until all copies are done."""


class CudaCopies(Copies):
    """Copies on a stream of their own, to and from page-locked memory: CUDA copies other memory synchronously."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def allocate(self, num_elements: int) -> Tensor:
        return torch.empty(num_elements, pin_memory=True)

    def copy(self, target: Tensor, source: Tensor) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def wait_on_host(self) -> None:
        self._stream.synchronize()

    def wait_on_device(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


def copies_of(device: torch.device) -> Copies:
    """Return the copies between this device and the host."""
    return CudaCopies(device) if device.type == "cuda" else Copies()


def page_locked_bytes(size: float) -> int:
    """Return the bytes that CUDA's allocator of page-locked memory takes for `size` bytes: the next power of two.

    Source: aten/src/ATen/core/CachingHostAllocator.h.
    """
    return 1 << max(0, int(size) - 1).bit_length() if size else 0
