"""Run one step's micro-batches again with hooks, to see what every module computes. No weight is changed.

Under FSDP2 all ranks replay together, because forward and backward passes gather weights.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qwlit.core.batch import MicroBatch
from qwlit.model.loss_model import LossModel
from qwlit.training.determinism import seed_micro_batch

Direction = Literal["forward", "backward", "input", "input gradient"]


@dataclass(frozen=True)
class Observation:
    """The largest absolute value of what a module gave in a pass: its output, or the gradient of its input."""

    module: str
    """Hugging Face name; "loss" for the loss itself."""
    direction: Direction
    largest: float

    @property
    def is_finite(self) -> bool:
        return self.largest != float("inf") and self.largest == self.largest


class _Recorder:
    """Collects the largest values on the device, in the order in which the modules ran."""

    def __init__(self) -> None:
        self.names: list[tuple[str, Direction]] = []
        self.values: list[Tensor] = []

    def add(self, module: str, direction: Direction, found: Any) -> None:
        for tensor in floating(found):
            self.names.append((module, direction))
            self.values.append(tensor.detach().abs().max().float())

    def observations(self) -> list[Observation]:
        largest = torch.stack(self.values).tolist() if self.values else []
        return [Observation(*name, value) for name, value in zip(self.names, largest, strict=True)]


def floating(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        if found.is_floating_point() and found.numel():
            yield found
    elif isinstance(found, tuple | list):
        for item in found:
            yield from floating(item)


@contextmanager
def hooks(model: nn.Module, add: Callable[[str, Direction, Any], None], *, with_inputs: bool = False) -> Iterator[None]:
    """Call `add` with the output of every module, and in the backward pass with the gradient of that output.

    Args:
        with_inputs: also with what every module is given, and its gradient.

    A hook on the output itself, and not torch's backward hook of modules: that one makes views, and in-place operations
    on views fail.
    """

    def watch(name: str, direction: Direction, gradient: Direction, found: Any) -> None:
        add(name, direction, found)
        for tensor in floating(found):
            if tensor.requires_grad:
                tensor.register_hook(partial(add, name, gradient))

    def before(name: str, module: nn.Module, args: Any, named: dict[str, Any]) -> None:
        watch(name, "input", "input gradient", (*args, *named.values()))

    def after(name: str, module: nn.Module, args: Any, output: Any) -> None:
        watch(name, "forward", "backward", output)

    handles: list[RemovableHandle] = []
    for name, module in model.named_modules():
        if name and with_inputs:
            handles.append(module.register_forward_pre_hook(partial(before, name), with_kwargs=True))
        if name:
            handles.append(module.register_forward_hook(partial(after, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def replay(
    model: LossModel, micro_batches: Sequence[MicroBatch], *, seed: int, step: int, rank: int
) -> list[Observation]:
    """Run forward and backward passes of these micro-batches; return what every module gave, in the order of the run.

    Args:
        step: counted from 0; with seed and rank it gives the dropout of the step.
    """
    recorder = _Recorder()
    # Compiled layers would not call the hooks inside them.
    with hooks(model.causal_lm, recorder.add), torch.compiler.set_stance("force_eager"):
        for index, micro in enumerate(micro_batches):
            seed_micro_batch(seed, step, rank, index)
            loss: Tensor = model(micro).loss_sum
            recorder.add("loss", "forward", loss)
            loss.backward()  # type: ignore[no-untyped-call]
    model.zero_grad()
    return recorder.observations()


def first_nonfinite(observations: Sequence[Observation]) -> Observation | None:
    """Return the first observation that is not finite: forward if there is one, else backward."""
    bad = [observation for observation in observations if not observation.is_finite]
    return next((observation for observation in bad if observation.direction == "forward"), bad[0] if bad else None)


def largest(observations: Sequence[Observation], direction: Direction) -> Observation | None:
    """Return the observation with the largest value in a direction."""
    found = [observation for observation in observations if observation.direction == direction]
    return max(found, key=lambda observation: observation.largest, default=None)
