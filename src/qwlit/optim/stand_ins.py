"""Optimizers that step other tensors in the place of the model's parameters.

`SliceOptimizer` gives each rank's shard slices to an optimizer that cannot work on FSDP2's sharded tensors, or for
which they make no sense: 8-bit moments share a scale in blocks, and the blocks follow the slices. `HostOptimizer`, in a
file of its own, steps copies in the host's memory.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qwlit.core.sharding import local, smallest_slice
from qwlit.optim.groups import ParameterGroup
from qwlit.optim.skippable import call_with_gradients

Build = Callable[[list[ParameterGroup]], Optimizer]


@dataclass
class Part:
    """Some of the parameters, and the optimizer of their stand-ins."""

    optimizer: Optimizer
    parameters: list[nn.Parameter]
    """Those of the model."""
    groups: list[int]
    """For each group of `optimizer`, the index of the group of the `StandInOptimizer` that it is a part of."""


class OwnState(dict[str, Any]):
    """The state of a parameter, which stays where it is: Lightning moves loaded state to the model's device."""

    def __setitem__(self, key: str, value: Any) -> None:
        """Ignore the value."""


class StandInOptimizer(Optimizer):
    """Has the model's parameters in its groups and steps others. It is saved and loaded as if it had no stand-ins.

    A subclass makes the stand-ins and copies gradients and weights. The state of a sharded parameter is that of this
    rank's shard slice.
    """

    stand_ins: dict[nn.Parameter, nn.Parameter]
    """Of each of the model's parameters."""
    parts: list[Part]
    """In the order in which they are stepped."""

    def __init__(self, groups: list[ParameterGroup]) -> None:
        """Take the options of the groups from the parts, which the subclass has built."""
        self.found_inf: Tensor | None = None
        self.grad_scale: Tensor | None = None
        options = {
            index: group
            for part in self.parts
            for index, group in zip(part.groups, part.optimizer.param_groups, strict=True)
        }
        super().__init__(
            [options[index] | {"params": list(group.parameters.values())} for index, group in enumerate(groups)], {}
        )

    def build_part(self, groups: list[ParameterGroup], build: Build, takes: Callable[[str], bool]) -> Part:
        """Make the stand-ins of all parameters whose name `takes` accepts, and build their optimizer."""
        named = [{name: p for name, p in group.parameters.items() if takes(name)} for group in groups]
        present = [index for index, own in enumerate(named) if own]
        parameters = [p for index in present for p in named[index].values()]
        self.stand_ins |= self.make_stand_ins(parameters)
        own_groups = [
            replace(groups[index], parameters={name: self.stand_ins[p] for name, p in named[index].items()})
            for index in present
        ]
        return Part(build(own_groups), parameters, present)

    def make_stand_ins(self, parameters: list[nn.Parameter]) -> dict[nn.Parameter, nn.Parameter]:
        raise NotImplementedError

    @property  # type: ignore[override]
    def state(self) -> dict[Any, Any]:
        """The state of each of the model's parameters that has one."""
        found = {}
        for part in self.parts:
            for parameter in part.parameters:
                if own := part.optimizer.state.get(self.stand_ins[parameter]):
                    found[parameter] = OwnState(own)
        return found

    @state.setter
    def state(self, value: Any) -> None:
        """Ignore what torch's `Optimizer` assigns: the parts have the state."""

    def state_dict(self) -> dict[str, Any]:
        found = super().state_dict()
        return found | {"state": {index: dict(own) for index, own in found["state"].items()}}

    def step_part(self, part: Part, *, found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
        """Step the stand-ins, whose gradients are set, with the options of this optimizer's groups."""
        for index, group in zip(part.groups, part.optimizer.param_groups, strict=True):
            group.update(self.param_groups[index] | {"params": group["params"]})
        part.optimizer.found_inf, part.optimizer.grad_scale = found_inf, grad_scale  # type: ignore[attr-defined]
        part.optimizer.step()
        part.optimizer.zero_grad()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict | {"state": {}})
        parameters = [p for group in self.param_groups for p in group["params"]]
        saved = {parameters[index]: values for index, values in state_dict["state"].items()}
        for part in self.parts:
            stand_ins = [p for group in part.optimizer.param_groups for p in group["params"]]
            model_parameter = {self.stand_ins[p]: p for p in part.parameters}
            state = {
                index: {k: local(v) if isinstance(v, Tensor) else v for k, v in saved[model_parameter[p]].items()}
                for index, p in enumerate(stand_ins)
                if model_parameter[p] in saved
            }
            part.optimizer.load_state_dict(part.optimizer.state_dict() | {"state": state})


class SliceOptimizer(StandInOptimizer):
    """Steps this rank's shard slices as plain tensors; they share the memory of the sharded parameters."""

    def __init__(self, groups: list[ParameterGroup], build: Build) -> None:
        self.stand_ins = {}
        self.parts = [self.build_part(groups, build, takes=lambda name: True)]
        super().__init__(groups)

    def make_stand_ins(self, parameters: list[nn.Parameter]) -> dict[nn.Parameter, nn.Parameter]:
        return {parameter: _slice_of(parameter) for parameter in parameters}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        result = call_with_gradients(closure)
        for parameter, stand_in in self.stand_ins.items():
            if parameter.grad is not None:
                stand_in.grad = local(parameter.grad)
        for part in self.parts:
            self.step_part(part, found_inf=self.found_inf, grad_scale=self.grad_scale)
        return result


def _slice_of(parameter: nn.Parameter) -> nn.Parameter:
    own = nn.Parameter(local(parameter.detach()))
    own.smallest_slice = smallest_slice(parameter)  # type: ignore[attr-defined]
    return own
