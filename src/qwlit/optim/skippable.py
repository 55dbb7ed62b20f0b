"""Clip and skip steps for optimizers whose kernels can do neither, and join several optimizers into one."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def call_with_gradients(closure: Callable[[], Any] | None) -> Any:
    """Call the closure of a step, in which Lightning may run forward and backward passes; return its result."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class SkippableOptimizer(Optimizer):
    """One optimizer whose groups and state are those of its parts. It is also saved as one optimizer.

    It clips in a separate pass over the gradients. The host decides whether to skip a step, so it waits for the device
    at every step.
    """

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts
        self._must_page = False
        self.found_inf: Tensor | None = None
        self.grad_scale: Tensor | None = None
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share({parameter: state for part in parts for parameter, state in part.state.items()})

    def _share(self, state: dict[Any, Any]) -> None:
        """Let this optimizer and its parts share the same groups and the same state."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self.state = defaultdict(dict, state)
        for part in self.parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        result = call_with_gradients(closure)
        if self.found_inf is not None and bool(self.found_inf):
            return result
        if self.grad_scale is not None:
            gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            torch._foreach_div_(gradients, self.grad_scale)
        if self._must_page:
            self._page()
        for part in self.parts:
            part.step()
        return result

    def _page(self) -> None:
        """Move loaded moments into paged memory: bitsandbytes itself does so only for moments that it creates."""
        self._must_page = False
        for part in self.parts:
            if not getattr(part, "is_paged", False):
                continue
            for parameter in (p for group in part.param_groups for p in group["params"]):
                moments = self.state.get(parameter, {})
                for name in moments.keys() & {"state1", "state2"}:
                    buffer = part.get_state_buffer(parameter, dtype=moments[name].dtype)  # type: ignore[attr-defined]
                    moments[name] = buffer.copy_(moments[name])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load each part's groups and state through that part: the optimizers cast loaded state differently."""
        groups = state_dict["param_groups"]
        merged: dict[Any, Any] = {}
        for part in self.parts:
            own, groups = groups[: len(part.param_groups)], groups[len(part.param_groups) :]
            indices = {index for group in own for index in group["params"]}
            state = {index: values for index, values in state_dict["state"].items() if index in indices}
            part.load_state_dict({"state": state, "param_groups": own})
            merged |= dict(part.state)
        # `step` calls `_page`, because Lightning moves the state to the device only after this.
        self._must_page = True
        self._share(merged)
