"""Build the optimizer: fused where torch has a fused kernel, because that kernel also clips and skips in one pass."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Muon, Optimizer

from qwlit.core.patterns import is_kind
from qwlit.core.quiet import quieten_bitsandbytes
from qwlit.optim.composite import Composite
from qwlit.optim.config import BITSANDBYTES, OptimConfig
from qwlit.optim.groups import ParameterGroup

TorchGroups = list[dict[str, Any]]


def build_optimizer(groups: list[ParameterGroup], config: OptimConfig) -> Optimizer:
    """Build the optimizer; each of its groups keeps its peak learning rate as `peak_lr`."""
    if config.name in BITSANDBYTES:
        return Composite(_bitsandbytes(groups, config))
    by_algorithm: dict[str, TorchGroups] = {}
    for group in groups:
        by_algorithm.setdefault(group.algorithm, []).append(_as_torch(group))
    parts = [BUILDERS[algorithm](found, config) for algorithm, found in by_algorithm.items()]
    return parts[0] if config.name == "adamw" else Composite(*parts)


def _as_torch(group: ParameterGroup) -> dict[str, Any]:
    return {
        "name": group.name,
        "params": list(group.parameters.values()),
        "lr": group.lr,
        "peak_lr": group.lr,
        "weight_decay": group.weight_decay,
    }


def _adamw(groups: TorchGroups, config: OptimConfig) -> Optimizer:
    return AdamW(groups, betas=config.betas, eps=config.eps, amsgrad=config.amsgrad, fused=True)


def _sgd(groups: TorchGroups, config: OptimConfig) -> Optimizer:
    # The fused kernel does not support DTensor, and a skipped first step leaves its momentum buffer uninitialized.
    return SGD(groups, momentum=config.momentum, nesterov=config.nesterov and config.momentum > 0, foreach=True)


def _muon(groups: TorchGroups, config: OptimConfig) -> Optimizer:
    return Muon(groups, momentum=config.momentum, nesterov=config.nesterov, adjust_lr_fn="match_rms_adamw")


BUILDERS: dict[str, Callable[[TorchGroups, OptimConfig], Optimizer]] = {"adamw": _adamw, "sgd": _sgd, "muon": _muon}


def _bitsandbytes(groups: list[ParameterGroup], config: OptimConfig) -> Optimizer:
    quieten_bitsandbytes()
    import bitsandbytes

    classes = {
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,
        "paged_adamw": bitsandbytes.optim.PagedAdamW32bit,
        "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
    }
    # Preflight warns about this before the run starts.
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for group in groups:
        for name, parameter in group.parameters.items():
            # Rare tokens make the moments of embedding and head uneven: bitsandbytes advises 32 bits for them
            # (Dettmers et al. 2022). Set the bits of every parameter, because the manager remembers parameters of
            # earlier runs in this process by their id, which Python may reuse.
            is_32bit = config.name == "paged_adamw" or is_kind("embedding", name) or is_kind("head", name)
            manager.override_config(parameter, "optim_bits", 32 if is_32bit else 8)
    optimizer: Optimizer = classes[config.name](
        [_as_torch(group) for group in groups], betas=config.betas, eps=config.eps
    )
    return optimizer


def set_learning_rate(optimizer: Optimizer, lr_multiplier: float) -> None:
    """Set every group to `lr_multiplier` times its peak learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * lr_multiplier


def set_clip_and_skip(
    optimizer: Optimizer, grad_norm: Tensor, max_grad_norm: float | None, loss_scale: float = 1.0
) -> Tensor:
    """Make the next `optimizer.step()` clip to `max_grad_norm`, or skip the step where `grad_norm` is not finite.

    Everything happens on the device, and the host does not wait for it (except with a `Composite`). The fused kernels
    divide gradients by `grad_scale`. Where `found_inf` is 1 they leave weights, moments and step count as they are;
    multiplying the gradients by 0 would not do that, because 0 * NaN is NaN.

    Args:
        grad_norm: total norm of the gradients, without the loss scale.
        loss_scale: the factor that the stored gradients still contain.

    Returns:
        `found_inf`, a float32 scalar: 1.0 where the optimizer will skip the step.
    """
    found_inf = (~torch.isfinite(grad_norm)).float()
    grad_scale = None
    if max_grad_norm is not None or loss_scale != 1.0:
        excess = (grad_norm.float() / (max_grad_norm or float("inf"))).clamp(min=1.0)
        grad_scale = excess * loss_scale
    optimizer.found_inf = found_inf  # type: ignore[attr-defined]
    optimizer.grad_scale = grad_scale  # type: ignore[attr-defined]
    return found_inf
