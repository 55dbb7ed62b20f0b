"""The optimizer. Fused, because clipping and skipping then happen inside its one pass over the weights."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qwlit.optim.config import OptimConfig
from qwlit.optim.groups import parameter_groups


def build_optimizer(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameter_groups(named_parameters, config),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        amsgrad=config.amsgrad,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def arm_clip_and_skip(
    optimizer: torch.optim.Optimizer, grad_norm: Tensor, max_grad_norm: float | None, loss_scale: float = 1.0
) -> Tensor:
    """Make the next `optimizer.step()` clip to `max_grad_norm`, or skip where `grad_norm` is not finite.

    All on the device, nothing waits.

    The fused kernel divides gradients by `grad_scale`, and where `found_inf` is 1 leaves weights, moments and step
    count untouched (multiplying by 0 would not: 0 * NaN is NaN).

    Args:
        grad_norm: total norm of the true gradients.
        loss_scale: the factor that the gradients at hand still carry.

    Returns:
        `found_inf`, a float32 scalar: 1.0 where the step will be skipped.
    """
    found_inf = (~torch.isfinite(grad_norm)).float()
    grad_scale = None
    if max_grad_norm is not None or loss_scale != 1.0:
        excess = (grad_norm.float() / (max_grad_norm or float("inf"))).clamp(min=1.0)
        grad_scale = excess * loss_scale
    optimizer.found_inf = found_inf  # type: ignore[attr-defined]
    optimizer.grad_scale = grad_scale  # type: ignore[attr-defined]
    return found_inf
