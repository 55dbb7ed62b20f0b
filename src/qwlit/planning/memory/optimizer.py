"""Bytes of an optimizer's state, and what its step allocates beside it."""

from collections.abc import Callable

from torch import nn

from qwlit.optim.config import OptimConfig
from qwlit.optim.groups import ParameterGroup
from qwlit.optim.kinds import OPTIMIZERS


def state_bytes(groups: list[ParameterGroup], config: OptimConfig, share: Callable[[nn.Parameter], int]) -> float:
    """Return the bytes of the optimizer state of all parameters.

    Args:
        share: returns how many elements of a parameter this device holds.
    """
    return sum(
        share(parameter) * OPTIMIZERS[group.algorithm].state_bytes(name, parameter, config)
        for group in groups
        for name, parameter in group.parameters.items()
    )


def step_bytes(groups: list[ParameterGroup], share: Callable[[nn.Parameter], int]) -> float:
    """Return the bytes that a step allocates beside weights, gradients and state.

    If there are several algorithms, they step one after another, so the largest one counts.
    """
    algorithms = {group.algorithm for group in groups}
    own_groups = {name: [group for group in groups if group.algorithm == name] for name in algorithms}
    return max((OPTIMIZERS[name].step_bytes(found, share) for name, found in own_groups.items()), default=0)
