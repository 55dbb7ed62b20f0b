"""Bytes of an optimizer's state, what its step allocates beside it, and what it takes of the host's memory."""

from collections import Counter
from collections.abc import Callable

from torch import nn

from qwlit.core.copies import page_locked_bytes
from qwlit.core.patterns import layer_of
from qwlit.optim.config import OptimConfig
from qwlit.optim.groups import ParameterGroup
from qwlit.optim.kinds import FLOAT32, OPTIMIZERS


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


def host_bytes(
    groups: list[ParameterGroup], config: OptimConfig, share: Callable[[nn.Parameter], int], *, page_locked: bool
) -> float:
    """Return the bytes of host memory that `HostOptimizer` takes: the moments, and copies of weights and gradients.

    Args:
        page_locked: whether the copies are page-locked, as with CUDA.
    """
    of_layer: Counter[int | None] = Counter()
    for group in groups:
        for name, parameter in group.parameters.items():
            of_layer[layer_of(name)] += FLOAT32 * share(parameter)
    copies = sum(2 * (page_locked_bytes(size) if page_locked else size) for size in of_layer.values())
    return state_bytes(groups, config, share) + copies
