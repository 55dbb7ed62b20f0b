"""The matrix products of a case alone, back to back: `python -m benchmarks.products products FOLDER OUT`.

One process runs the steps once (the loop of the arm `raw`) and notes the shapes of every matrix product and of every
attention of the first to the last step, forward and backward. Then it runs the same products, and nothing else, twice,
and writes the seconds per step of the second time. Attention is run as the one kernel that torch has for it.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.arms import raw
from benchmarks.work import Case, Record, read_case

aten = torch.ops.aten
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""An operator, its arguments and its named arguments; layouts stand for tensors."""
PRODUCTS = (
    *(aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.addmm_),
    *(aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention_for_cpu_backward),
)


class Shapes(TorchDispatchMode):
    """Notes the calls of `PRODUCTS`, with shapes instead of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in PRODUCTS:
            self.calls.append((func, tuple(map(_shape, args)), {k: _shape(v) for k, v in kwargs.items()}))
        return func(*args, **kwargs)


class Layout(tuple[Any, ...]):
    """Shape, strides and dtype of a tensor."""


class Starts(Record):
    """Keeps the number of calls that were noted when each step ended."""

    def __init__(self, case: Case, shapes: Shapes) -> None:
        super().__init__(case)
        self._shapes = shapes
        self.counts: list[int] = []

    def step(self, loss: float | None = None) -> None:
        self.counts.append(len(self._shapes.calls))


def _shape(value: Any) -> Any:
    return Layout((value.shape, value.stride(), value.dtype)) if isinstance(value, Tensor) else value


def _extent(layout: Layout) -> int:
    """Return how many elements of memory a tensor of this layout spans."""
    shape, stride, _ = layout
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if 0 not in shape else 0


class Memory:
    """One memory for each argument and dtype, of which every tensor is a view: the logits alone have many shapes."""

    def __init__(self, calls: list[Call]) -> None:
        sizes: dict[tuple[Any, torch.dtype], int] = {}
        for _, args, kwargs in calls:
            for place, value in (*enumerate(args), *kwargs.items()):
                if isinstance(value, Layout):
                    key = place, value[2]
                    sizes[key] = max(sizes.get(key, 0), _extent(value))
        self._memory = {key: torch.empty(size, dtype=key[1]).normal_() for key, size in sizes.items()}

    def tensor(self, place: Any, value: Any) -> Any:
        """Return the tensor of a layout; two arguments of a call never share one."""
        if not isinstance(value, Layout):
            return value
        shape, stride, dtype = value
        return self._memory[place, dtype].as_strided(shape, stride)


def main(_: str, folder: str, out: str) -> None:
    case, shapes = read_case(Path(folder)), Shapes()
    record = Starts(case, shapes)
    with shapes:
        raw(case, Path(folder), record)
    calls = shapes.calls[record.counts[0] : record.counts[-1]]
    memory = Memory(calls)
    seconds = 0.0
    with torch.no_grad():
        for _ in range(2):
            began = time.perf_counter()
            for func, args, kwargs in calls:
                filled = [memory.tensor(place, value) for place, value in enumerate(args)]
                func(*filled, **{name: memory.tensor(name, value) for name, value in kwargs.items()})
            seconds = time.perf_counter() - began
    result = {"calls": len(calls), "seconds_per_step": seconds / (len(record.counts) - 1)}
    Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
