"""Build the optimizer from the parameter groups, set its learning rates, and tell it to clip or to skip a step."""

from collections.abc import Iterator
from functools import partial

from torch import Tensor
from torch.optim import Optimizer

from qwlit.core.copies import Copies
from qwlit.core.sharding import is_sharded
from qwlit.optim.config import OptimConfig
from qwlit.optim.groups import ParameterGroup
from qwlit.optim.host import HostOptimizer
from qwlit.optim.kinds import OPTIMIZERS
from qwlit.optim.skippable import SkippableOptimizer
from qwlit.optim.stand_ins import SliceOptimizer


def build_optimizer(groups: list[ParameterGroup], config: OptimConfig, to_host: Copies | None = None) -> Optimizer:
    """Build the optimizer; each of its groups keeps its peak learning rate as `peak_lr`.

    Args:
        to_host: copies to the host, on which the optimizer steps; None: it steps on the device.
    """
    if to_host is not None:
        return HostOptimizer(groups, partial(build_optimizer, config=config), to_host)
    if OPTIMIZERS[config.name].sharding == "slices" and any(map(is_sharded, _parameters(groups))):
        return SliceOptimizer(groups, partial(build_optimizer, config=config))
    by_algorithm: dict[str, list[ParameterGroup]] = {}
    for group in groups:
        by_algorithm.setdefault(group.algorithm, []).append(group)
    parts = [OPTIMIZERS[algorithm].build(found, config) for algorithm, found in by_algorithm.items()]
    clips_and_skips = len(parts) == 1 and OPTIMIZERS[config.name].clips_and_skips
    return parts[0] if clips_and_skips else SkippableOptimizer(*parts)


def _parameters(groups: list[ParameterGroup]) -> Iterator[Tensor]:
    return (parameter for group in groups for parameter in group.parameters.values())


def set_learning_rate(optimizer: Optimizer, lr_multiplier: float) -> None:
    """Set every group to `lr_multiplier` times its peak learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * lr_multiplier


def set_clip_and_skip(
    optimizer: Optimizer, grad_norm: Tensor, max_grad_norm: float | None, skipped: Tensor, loss_scale: float = 1.0
) -> None:
    """Make the next `optimizer.step()` clip to `max_grad_norm`, or skip the step where `skipped` is 1.

    Everything happens on the device, and the host does not wait for it; only `SkippableOptimizer` makes the host wait.
    The fused kernels divide gradients by `grad_scale`. If `found_inf` is 1, they leave weights, moments and step count
    as they are. Multiplying the gradients by 0 would not do that, because 0 * NaN is NaN.

    Args:
        grad_norm: total norm of the gradients, without the loss scale.
        skipped: float32 scalar, 0.0 or 1.0.
        loss_scale: the factor that the stored gradients still contain.
    """
    grad_scale = None
    if max_grad_norm is not None or loss_scale != 1.0:
        excess = (grad_norm.float() / (max_grad_norm or float("inf"))).clamp(min=1.0)
        grad_scale = excess * loss_scale
    optimizer.found_inf = skipped  # type: ignore[attr-defined]
    optimizer.grad_scale = grad_scale  # type: ignore[attr-defined]
