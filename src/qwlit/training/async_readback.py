"""Read numbers from the device without waiting for it."""

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class AsyncReadback(Generic[T]):
    """Copies small tensors to the host in the background and returns them in order.

    On CPU they are there at once. On a GPU each is returned one push later, when its copy is usually done. It is never
    returned earlier, even if the copy is done: all ranks must read the same numbers at the same step, because they
    decide by them, for example to stop the run.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[T, Tensor, torch.cuda.Event | None]] = deque()

    def push(self, tag: T, values: Tensor) -> None:
        """Start copying `values`; `pop` yields them with `tag`."""
        if values.device.type != "cuda":
            self._pending.append((tag, values.detach().clone(), None))
            return
        # A copy is asynchronous only into page-locked memory. The event marks its end on the current stream.
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values.detach(), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((tag, host, event))

    def pop(self, *, wait: bool = False) -> Iterator[tuple[T, list[float]]]:
        """Yield all values, on a GPU all but the newest; with `wait` the newest too."""
        while self._pending:
            tag, values, event = self._pending[0]
            if event is not None:
                if len(self._pending) == 1 and not wait:
                    return
                # The host must not read the memory before the copy has ended.
                event.synchronize()
            self._pending.popleft()
            yield tag, values.tolist()
