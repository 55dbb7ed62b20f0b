"""Reading numbers from the device without waiting for it."""

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class AsyncReadback(Generic[T]):
    """Copies small tensors to the host in the background and gives them back, in order.

    On CPU at once. On a GPU each one push later, which is long after it was computed, and not whenever it happens to
    have arrived: all ranks must read the same numbers at the same step, or they would not decide together.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[T, Tensor, torch.cuda.Event | None]] = deque()

    def push(self, tag: T, values: Tensor) -> None:
        """Start copying `values`; `tag` comes back with them."""
        if values.device.type != "cuda":
            self._pending.append((tag, values.detach().clone(), None))
            return
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values.detach(), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((tag, host, event))

    def pop(self, *, wait: bool = False) -> Iterator[tuple[T, list[float]]]:
        """Yield all but a GPU's newest; with `wait` that too."""
        while self._pending:
            tag, values, event = self._pending[0]
            if event is not None:
                if len(self._pending) == 1 and not wait:
                    return
                event.synchronize()
            self._pending.popleft()
            yield tag, values.tolist()
