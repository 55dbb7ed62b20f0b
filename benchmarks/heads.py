"""Heads that compute the same loss and gradients, ours and other people's: arms of `benchmarks.head` and of the GPU's.

Shapes: N rows, D hidden, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwlit.model.head import linear_cross_entropy


@dataclass(frozen=True)
class Rows:
    """What a head gets: the last hidden states of a micro-batch, the weight, and the target of each row."""

    states: Tensor
    """(N, D), in the dtype of the matrix products."""
    weight: Tensor
    """(V, D): float32 if it is trained."""
    targets: Tensor
    """(N,), -100 where a row is not supervised."""
    positions: Tensor
    """Of the supervised rows; qwlit's batches have them, so that no head need wait for the device to find them."""

    @property
    def supervised(self) -> Tensor:
        return self.states[self.positions]

    @property
    def labels(self) -> Tensor:
        return self.targets[self.positions]

    @property
    def factor(self) -> Tensor:
        """The weight in the dtype of the products, a copy as autocast makes it."""
        return self.weight.to(self.states.dtype)


def draw_rows(
    rows: int, hidden: int, vocabulary: int, supervised: float, *, device: str, dtype: torch.dtype, trained: bool
) -> Rows:
    """Draw states whose targets have logits from 4 to 16, so that likely and unlikely ones occur as in a real model.

    The loss is then about 2.7 nats. Where all logits are alike, a head that leaves out small gradients has no work.

    Args:
        trained: the weight is float32 and gets a gradient; otherwise it has `dtype` and is frozen.
    """
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(vocabulary, hidden, generator=generator, device=device).mul_(0.02)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator, device=device)
    strength = 4 + 12 * torch.rand(rows, 1, generator=generator, device=device)
    states = torch.randn(rows, hidden, generator=generator, device=device)
    states += strength * F.normalize(weight[targets]) / weight[targets].norm(dim=1, keepdim=True)
    order = torch.randperm(rows, generator=generator, device=device)
    targets[order[: round((1 - supervised) * rows)]] = -100
    weight = weight.requires_grad_() if trained else weight.to(dtype)
    return Rows(states.to(dtype).requires_grad_(), weight, targets, (targets >= 0).nonzero()[:, 0])


def ours(rows: Rows) -> Tensor:
    """qwlit's head."""
    return linear_cross_entropy(rows.supervised, rows.weight, rows.labels)[0]


def plain(rows: Rows) -> Tensor:
    """What transformers does: logits of all rows in float32, and cross_entropy that ignores the masked ones."""
    return F.cross_entropy((rows.states @ rows.factor.T).float(), rows.targets, ignore_index=-100, reduction="sum")


def plain_supervised(rows: Rows) -> Tensor:
    """Logits of the supervised rows in float32, and cross_entropy."""
    return F.cross_entropy((rows.supervised @ rows.factor.T).float(), rows.labels, reduction="sum")


def torch_chunked(rows: Rows) -> Tensor:
    """torch's own linear_cross_entropy (2.13 and later), which computes the rows in chunks."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(
        rows.states, rows.factor, rows.targets, reduction="sum", ignore_index=-100, options=options
    )


def liger(rows: Rows) -> Tensor:
    """Liger's fused head on the supervised rows, the weight's gradient added up in float32."""
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss: Any = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
    return loss(rows.factor, rows.supervised, rows.labels)  # type: ignore[no-any-return]


def cut(rows: Rows) -> Tensor:
    """cut-cross-entropy on the supervised rows; it leaves out gradients below bfloat16's resolution."""
    from cut_cross_entropy import linear_cross_entropy as cut_cross_entropy

    return cut_cross_entropy(rows.supervised, rows.factor, rows.labels, reduction="sum")  # type: ignore[no-any-return]


def cut_exact(rows: Rows) -> Tensor:
    """cut-cross-entropy on the supervised rows, with all gradients."""
    from cut_cross_entropy import linear_cross_entropy as cut_cross_entropy

    return cut_cross_entropy(  # type: ignore[no-any-return]
        rows.supervised, rows.factor, rows.labels, reduction="sum", filter_eps=None
    )


def trl_tiles(rows: Rows) -> Tensor:
    """TRL's head on the supervised rows: tiles of the vocabulary, computed again in the backward pass."""
    from trl.kernels import ChunkedLogProbFunction

    tile = 32_768  # of TRL 1.16's trainer
    outputs = ChunkedLogProbFunction.apply(
        rows.supervised, rows.factor, None, rows.labels, 1.0, tile, None, 1.0, ("log_probs",)
    )
    return -outputs[0].sum()  # type: ignore[no-any-return]


HEADS: dict[str, Callable[[Rows], Tensor]] = {
    head.__name__: head for head in (ours, plain, plain_supervised, torch_chunked, liger, cut, cut_exact, trl_tiles)
}
PACKAGES = {"liger": "liger_kernel", "cut": "cut_cross_entropy", "cut_exact": "cut_cross_entropy", "trl_tiles": "trl"}


def why_not(head: str, device: str) -> str | None:
    """Return why a head cannot be measured on this machine; None if it can."""
    package = PACKAGES.get(head)
    if package and find_spec(package) is None:
        return f"not installed: {package}"
    if head in ("liger", "cut", "cut_exact") and device != "cuda":
        return "needs a GPU"
    if head == "torch_chunked" and not hasattr(F, "linear_cross_entropy"):
        return "not installed: torch 2.13 or later"
    return None
