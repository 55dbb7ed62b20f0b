"""Bytes of an optimizer's state, and what its step holds beside it."""

from collections.abc import Callable

from torch import nn

from qwlit.core.patterns import is_kind
from qwlit.optim.config import OptimConfig
from qwlit.optim.groups import ParameterGroup

FLOAT32 = 4
# bitsandbytes: 8-bit moments share a float32 scale in blocks of 256; tensors below 4096 elements stay float32.
BLOCK_8BIT, SMALLEST_8BIT = 256, 4096


def state_bytes(groups: list[ParameterGroup], config: OptimConfig, share: Callable[[nn.Parameter], int]) -> float:
    """Return the bytes of all moments.

    Args:
        share: how many of a parameter's numbers this device holds.
    """
    return sum(
        share(parameter) * _bytes_each(name, parameter, group.algorithm, config)
        for group in groups
        for name, parameter in group.parameters.items()
    )


def _bytes_each(name: str, parameter: nn.Parameter, algorithm: str, config: OptimConfig) -> float:
    if algorithm == "muon":
        return FLOAT32
    if algorithm == "sgd":
        return FLOAT32 if config.momentum else 0
    in_8_bits = algorithm in ("adamw_8bit", "paged_adamw_8bit") and parameter.numel() >= SMALLEST_8BIT
    if in_8_bits and not is_kind("embedding", name) and not is_kind("head", name):
        return 2 * (1 + FLOAT32 / BLOCK_8BIT)
    return FLOAT32 * (3 if config.amsgrad else 2)


def step_bytes(groups: list[ParameterGroup], config: OptimConfig, share: Callable[[nn.Parameter], int]) -> float:
    """Return what a step holds beside weights, gradients and state; the fused kernels hold nothing."""
    muon = [p.numel() for group in groups if group.algorithm == "muon" for p in group.parameters.values()]
    # Newton and Schulz's iteration on one matrix at a time: its update in float32, and in bfloat16 the iterate, its
    # product with itself and two results (at most its own size each).
    orthogonalizing = max(muon, default=0) * (FLOAT32 + 4 * 2)
    sgd = [group for group in groups if group.algorithm == "sgd"]
    # Decay is added to a copy of all gradients at once (foreach).
    copies = sum(share(p) * FLOAT32 for group in sgd if group.weight_decay for p in group.parameters.values())
    return max(orthogonalizing, copies)
