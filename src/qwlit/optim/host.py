"""Step in the host's memory: the moments are there, and a copy of weights and gradients. The device keeps no moments.

While the step's last backward pass runs, each gradient is copied to the host as soon as it is complete. When the norm
is known, the host steps one layer after another, and copies a layer's weights back while it steps the next one. The
device waits for these copies before it computes again, so every reader of the weights sees the step's result.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qwlit.core.copies import Copies
from qwlit.core.patterns import layer_of
from qwlit.core.sharding import local
from qwlit.optim.groups import ParameterGroup
from qwlit.optim.skippable import call_with_gradients
from qwlit.optim.stand_ins import Build, Part, StandInOptimizer


class HostOptimizer(StandInOptimizer):
    """Steps copies of the parameters, or under FSDP2 of this rank's shard slices, on the host."""

    def __init__(self, groups: list[ParameterGroup], build: Build, copies: Copies) -> None:
        """Allocate the host's memory.

        Args:
            groups: of the parameters on the device.
            build: builds the optimizer of groups on the host.
        """
        self._copies = copies
        self._gradients: dict[nn.Parameter, Tensor] = {}
        """The host's memory for the gradient of each of the model's parameters."""
        self._versions: dict[nn.Parameter, tuple[int, int]] = {}
        """`_version` of each of the model's parameters when the host's copy was equal to it."""
        self._hooks: list[RemovableHandle] = []
        self.stand_ins = {}
        self.parts = [
            self.build_part(groups, build, takes=partial(_is_in_layer, layer=layer)) for layer in _layers(groups)
        ]
        super().__init__(groups)

    def make_stand_ins(self, parameters: list[nn.Parameter]) -> dict[nn.Parameter, nn.Parameter]:
        """Make uninitialized copies in two pieces of memory: each page-locked piece takes a power of two."""
        slices = [local(parameter.detach()) for parameter in parameters]
        sizes = [own.numel() for own in slices]
        weights, gradients = (self._copies.allocate(sum(sizes)).split(sizes) for _ in range(2))
        for parameter, own, gradient in zip(parameters, slices, gradients, strict=True):
            self._gradients[parameter] = gradient.view(own.shape)
        return {
            parameter: nn.Parameter(weight.view(own.shape))
            for parameter, own, weight in zip(parameters, slices, weights, strict=True)
        }

    def begin_last_backward(self) -> None:
        """Copy each gradient to the host as soon as the backward pass that begins now completes it."""
        self._hooks = [p.register_post_accumulate_grad_hook(self._copy_to_host) for p in self.stand_ins]

    @torch.no_grad()
    def _copy_to_host(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
        stand_in, weight = self.stand_ins[parameter], local(parameter)
        if self._versions.get(parameter) != _version(parameter):
            # The first step, or something else has written the weight, such as a checkpoint that was loaded.
            self._copies.copy(stand_in, weight)
            self._versions[parameter] = _version(parameter)
        self._copies.copy(self._gradients[parameter], local(parameter.grad))
        stand_in.grad = self._gradients[parameter]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        result = call_with_gradients(closure)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        # Reading it waits for the device, and with it for the backward pass.
        is_skipped = self.found_inf is not None and bool(self.found_inf)
        self._copies.wait_on_host()
        scale = None if self.grad_scale is None else self.grad_scale.cpu()
        for part in self.parts:
            if is_skipped:
                part.optimizer.zero_grad()
            else:
                self._step_and_return(part, scale)
        self._copies.wait_on_device()
        return result

    def _step_and_return(self, part: Part, scale: Tensor | None) -> None:
        """Step a part and begin to copy its weights back to the device."""
        changed = [p for p in part.parameters if self.stand_ins[p].grad is not None]
        self.step_part(part, found_inf=None, grad_scale=scale)
        for parameter in changed:
            weight = local(parameter)
            self._copies.copy(weight, self.stand_ins[parameter])
            self._versions[parameter] = _version(parameter)


def _version(parameter: nn.Parameter) -> tuple[int, int]:
    """Return torch's counts of the writes to a parameter: writes to a sharded one do not count for its own slice."""
    return parameter._version, local(parameter)._version


def _is_in_layer(name: str, layer: int | None) -> bool:
    return layer_of(name) == layer


def _layers(groups: list[ParameterGroup]) -> list[int | None]:
    """Return the layers in the order of the forward pass; None, for what is outside of them, comes first."""
    layers = {layer_of(name) for group in groups for name in group.parameters}
    return sorted(layers, key=lambda layer: -1 if layer is None else layer)
