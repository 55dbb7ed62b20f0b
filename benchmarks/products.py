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
PRODUCTS = (
    *(aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.addmm_),
    *(aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention_for_cpu_backward),
)


class Shapes(TorchDispatchMode):
    """Notes the calls of `PRODUCTS`, with shapes instead of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

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


def _tensor(value: Any, place: Any, made: dict[Any, Tensor]) -> Any:
    """Return the tensor of a layout; two arguments of a call never share one."""
    if not isinstance(value, Layout):
        return value
    if (place, value) not in made:
        shape, stride, dtype = value
        made[place, value] = torch.empty_strided(shape, stride, dtype=dtype).normal_()
    return made[place, value]


def main(_: str, folder: str, out: str) -> None:
    case, shapes = read_case(Path(folder)), Shapes()
    record = Starts(case, shapes)
    with shapes:
        raw(case, Path(folder), record)
    calls = shapes.calls[record.counts[0] : record.counts[-1]]
    made: dict[Any, Tensor] = {}
    seconds = 0.0
    with torch.no_grad():
        for _ in range(2):
            began = time.perf_counter()
            for func, args, kwargs in calls:
                filled = [_tensor(value, place, made) for place, value in enumerate(args)]
                func(*filled, **{name: _tensor(value, name, made) for name, value in kwargs.items()})
            seconds = time.perf_counter() - began
    result = {"calls": len(calls), "seconds_per_step": seconds / (len(record.counts) - 1)}
    Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
