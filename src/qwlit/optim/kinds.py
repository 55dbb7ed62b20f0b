"""The table of optimizers. To add one, write an entry here and a file in `conf/optim/`.

The build functions import torch themselves, so that settings can be checked against this table without loading torch.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from qwlit.core.patterns import is_kind
from qwlit.core.quiet import quieten_bitsandbytes

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from qwlit.optim.config import OptimConfig
    from qwlit.optim.groups import ParameterGroup

FLOAT32 = 4
"""Bytes."""
# bitsandbytes: 8-bit moments share a float32 scale in blocks of 256; tensors below 4096 elements stay float32.
BLOCK_8BIT, SMALLEST_8BIT = 256, 4096


def _trains_all(name: str, parameter: "nn.Parameter") -> bool:
    return True


def _no_bytes(groups: list["ParameterGroup"], share: Callable[["nn.Parameter"], int]) -> float:
    return 0


@dataclass(frozen=True)
class OptimizerKind:
    """How to build an optimizer, how much memory it takes, and which settings it works with."""

    build: Callable[[list["ParameterGroup"], "OptimConfig"], "Optimizer"]
    """Builds the optimizer for groups of parameters. `torch_group` turns a group into torch's form."""
    state_bytes: Callable[[str, "nn.Parameter", "OptimConfig"], float]
    """Returns the bytes of optimizer state per element of a parameter, given the parameter's name."""
    step_bytes: Callable[[list["ParameterGroup"], Callable[["nn.Parameter"], int]], float] = _no_bytes
    """Returns the bytes that a step allocates beside weights, gradients and state. The second argument returns how many
    elements of a parameter this device holds."""
    trains: Callable[[str, "nn.Parameter"], bool] = _trains_all
    """Whether the optimizer trains this parameter, given its name. adamw trains the other parameters."""
    clips_and_skips: bool = False
    """Whether its kernels divide the gradients by `grad_scale` and skip the step where `found_inf` is 1. For other
    optimizers `SkippableOptimizer` does both."""
    sharding: Literal["whole", "slices", "none"] = "whole"
    """What it gets of a parameter that FSDP2 shards: the sharded tensor, which it treats as a whole; this rank's shard
    slice; or nothing, because it cannot be sharded."""
    has_blocks: bool = False
    """Whether blocks of its moments share a scale."""
    can_step_on_host: bool = False
    """Whether `HostOptimizer` can step it: each element alone, and fast enough on CPU."""
    needs_rows_on_each_rank: bool = False
    """Whether it fails on a sharded parameter with fewer rows than there are ranks."""
    allows_strict: bool = True
    """Whether determinism=strict allows it: it computes and stores everything in float32."""
    has_amsgrad: bool = False
    """Whether it reads optim.amsgrad."""
    has_momentum: bool = False
    """Whether it reads optim.momentum and optim.nesterov."""
    is_paged: bool = False
    """Whether its state moves from GPU memory to the host's memory when the GPU is full."""
    has_adamw_lr_limit: bool = False
    """Whether pretrained weights diverge above the same learning rate as with AdamW (preflight rules full_lr and
    full_lr_large)."""
    has_adamw_lr_range: bool = False
    """Whether AdamW's usual range of learning rates is its range too (preflight rule lr_range)."""


def torch_group(group: "ParameterGroup") -> dict[str, Any]:
    """Return the group in the form that torch's optimizers take."""
    return {
        "name": group.name,
        "params": list(group.parameters.values()),
        "lr": group.lr,
        "peak_lr": group.lr,
        "weight_decay": group.weight_decay,
    }


def _adamw(groups: list["ParameterGroup"], config: "OptimConfig") -> "Optimizer":
    from torch.optim import AdamW

    # The fused kernel clips and skips in the same pass over the parameters.
    return AdamW(map(torch_group, groups), betas=config.betas, eps=config.eps, amsgrad=config.amsgrad, fused=True)


def _adamw_state_bytes(name: str, parameter: "nn.Parameter", config: "OptimConfig") -> float:
    return FLOAT32 * (3 if config.amsgrad else 2)


def _sgd(groups: list["ParameterGroup"], config: "OptimConfig") -> "Optimizer":
    from torch.optim import SGD

    nesterov = config.nesterov and config.momentum > 0
    # The fused kernel does not support DTensor, and a skipped first step leaves its momentum buffer uninitialized.
    return SGD(map(torch_group, groups), momentum=config.momentum, nesterov=nesterov, foreach=True)


def _sgd_state_bytes(name: str, parameter: "nn.Parameter", config: "OptimConfig") -> float:
    return FLOAT32 if config.momentum else 0


def _sgd_step_bytes(groups: list["ParameterGroup"], share: Callable[["nn.Parameter"], int]) -> float:
    # foreach adds the weight decay to a copy of the gradients of all parameters at once.
    return sum(share(p) * FLOAT32 for group in groups if group.weight_decay for p in group.parameters.values())


def _muon(groups: list["ParameterGroup"], config: "OptimConfig") -> "Optimizer":
    from torch.optim import Muon

    return Muon(
        map(torch_group, groups), momentum=config.momentum, nesterov=config.nesterov, adjust_lr_fn="match_rms_adamw"
    )


def _is_hidden_matrix(name: str, parameter: "nn.Parameter") -> bool:
    # Muon orthogonalizes matrices. Its authors leave vectors, the embedding and the head to AdamW.
    return parameter.ndim == 2 and not is_kind("embedding", name) and not is_kind("head", name)


def _muon_state_bytes(name: str, parameter: "nn.Parameter", config: "OptimConfig") -> float:
    return FLOAT32


def _muon_step_bytes(groups: list["ParameterGroup"], share: Callable[["nn.Parameter"], int]) -> float:
    # The update (m, n) in float32, and for the Newton-Schulz iteration in bfloat16: X (m, n), X times its transpose and
    # the polynomial of that (m, m), and the next X. Muon does this for one matrix after another, and m <= n.
    largest = max((p.numel() for group in groups for p in group.parameters.values()), default=0)
    return largest * (FLOAT32 + 4 * 2)


def _bitsandbytes(groups: list["ParameterGroup"], config: "OptimConfig", *, class_name: str, bits: int) -> "Optimizer":
    quieten_bitsandbytes()
    import bitsandbytes

    # Preflight warns about this before the run starts.
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for group in groups:
        for name, parameter in group.parameters.items():
            # Set the bits of every parameter, because the manager remembers parameters of earlier runs in this process
            # by their id, which Python may reuse.
            is_8bit = bits == 8 and _may_have_8_bits(name) and _smallest_slice(parameter) >= SMALLEST_8BIT
            manager.override_config(parameter, "optim_bits", 8 if is_8bit else 32)
    optimizer: Optimizer = getattr(bitsandbytes.optim, class_name)(
        list(map(torch_group, groups)), betas=config.betas, eps=config.eps
    )
    return optimizer


def _smallest_slice(parameter: "nn.Parameter") -> int:
    """Return the elements of the parameter, or of the smallest slice that a rank has of it.

    The bits must not differ from rank to rank: the ranks compare their state, and each of them names its tensors.
    """
    return int(getattr(parameter, "smallest_slice", parameter.numel()))


def _may_have_8_bits(name: str) -> bool:
    # Rare tokens make the moments of embedding and head uneven: bitsandbytes advises 32 bits for them (Dettmers et al.
    # 2022).
    return not is_kind("embedding", name) and not is_kind("head", name)


def _state_bytes_8bit(name: str, parameter: "nn.Parameter", config: "OptimConfig") -> float:
    if parameter.numel() >= SMALLEST_8BIT and _may_have_8_bits(name):
        return 2 * (1 + FLOAT32 / BLOCK_8BIT)
    return _adamw_state_bytes(name, parameter, config)


def _bitsandbytes_kind(class_name: str, *, bits: int, is_paged: bool) -> OptimizerKind:
    return OptimizerKind(
        build=partial(_bitsandbytes, class_name=class_name, bits=bits),
        state_bytes=_state_bytes_8bit if bits == 8 else _adamw_state_bytes,
        sharding="slices",
        has_blocks=bits == 8,
        needs_rows_on_each_rank=True,
        allows_strict=False,
        is_paged=is_paged,
        has_adamw_lr_limit=True,
        has_adamw_lr_range=True,
    )


OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind(
        build=_adamw,
        state_bytes=_adamw_state_bytes,
        clips_and_skips=True,
        can_step_on_host=True,
        has_amsgrad=True,
        has_adamw_lr_limit=True,
        has_adamw_lr_range=True,
    ),
    "muon": OptimizerKind(
        build=_muon,
        state_bytes=_muon_state_bytes,
        step_bytes=_muon_step_bytes,
        trains=_is_hidden_matrix,
        needs_rows_on_each_rank=True,
        allows_strict=False,
        has_momentum=True,
        has_adamw_lr_limit=True,
    ),
    "sgd": OptimizerKind(
        build=_sgd,
        state_bytes=_sgd_state_bytes,
        step_bytes=_sgd_step_bytes,
        can_step_on_host=True,
        has_momentum=True,
    ),
    "adamw_8bit": _bitsandbytes_kind("AdamW8bit", bits=8, is_paged=False),
    "paged_adamw": _bitsandbytes_kind("PagedAdamW32bit", bits=32, is_paged=True),
    "paged_adamw_8bit": _bitsandbytes_kind("PagedAdamW8bit", bits=8, is_paged=True),
}
"""By the value of optim.name."""
