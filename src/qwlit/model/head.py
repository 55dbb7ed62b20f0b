"""Head and loss in one function: cross-entropy at the label positions, without holding all logits at once.

At a vocabulary of 151,936 the logits are the largest tensor of a run, so the head computes them for a chunk of rows at
a time. It computes the gradient in the forward pass too, while it has the logits; the backward pass only scales it.

Shapes: N label positions, R rows of a chunk, D hidden, V vocabulary.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qwlit.model.cpu import logits_memory

# Bytes of a chunk's float32 logits. At V = 151,936: 2,208 rows on CUDA, 441 on CPU. With fewer rows the matrix products
# are inefficient, because for every chunk they read the whole weight, and read and write its whole gradient.
CHUNK_BYTES = {"cuda": 5 * 2**28, "cpu": 2**28}
# Bytes of the logits of one softmax call. On CPU they are so few that they stay in the cache and in memory that malloc
# keeps: the page faults of large temporary tensors cost as much time as the arithmetic (measured with 480 rows at
# V = 151,936, D = 256 on 2 cores: 0.92 s in one call, 0.78 s in blocks; the matrix products alone take 0.69 s).
BLOCK_BYTES = {"cuda": CHUNK_BYTES["cuda"], "cpu": 2**22}
PRODUCT_BYTES = 2**28
"""On CUDA: bytes of a float32 product that is added to the weight's gradient. The whole product would be a second
matrix of 2.3 GiB at V = 151,936, D = 4096. Assumption: pieces of this size are large enough to be as fast."""


class LMHead(nn.Linear):
    """The head with its loss as a method: FSDP2 gathers the weight for a module's own methods only."""

    @classmethod
    def of(cls, linear: nn.Linear) -> "LMHead":
        """Return a head that has the weight of `linear`."""
        with torch.device("meta"):
            head = cls(linear.in_features, linear.out_features, bias=False)
        head.weight = linear.weight
        return head

    def loss(self, hidden: Tensor, targets: Tensor, *, count_correct: bool) -> tuple[Tensor, Tensor]:
        """Return the summed loss and the number of correct argmaxes, see `linear_cross_entropy`."""
        if self.weight.requires_grad and self.weight.dtype == torch.bfloat16:
            # FSDP2 has gathered the weight in bfloat16; its gradient stays float32, as that of a float32 weight.
            self.weight.grad_dtype = torch.float32
        return linear_cross_entropy(hidden, self.weight, targets, count_correct=count_correct)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, count_correct: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of the logits `hidden @ weight.T`, and the number of correct argmaxes.

    The matrix products run in autocast's dtype, or in hidden's dtype without autocast. The softmax runs in float32, or
    in float64 if `hidden` has it.

    Args:
        hidden: (N, D). N may be 0: the loss is then 0, and every parameter gets a gradient of 0.
        weight: (V, D), the head's. Its gradient is computed only if it requires one.
        targets: (N,) int64.
        count_correct: count the correct argmaxes, in another pass over the logits; otherwise the count is 0.

    Returns:
        loss_sum, a float32 scalar in nats; num_correct, an int64 scalar.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call, no-any-return]
            hidden.to(dtype), weight, targets, count_correct, torch.is_grad_enabled()
        )


@torch.no_grad()
def token_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of each label position, (N,) float32 in nats, and whether its argmax is right, (N,).

    Arguments and precision are those of `linear_cross_entropy`.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    precise = torch.promote_types(dtype, torch.float32)
    losses = torch.empty(len(hidden), dtype=precise, device=hidden.device)
    is_correct = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
    with torch.autocast(device, enabled=False):
        rows, head = hidden.to(dtype), weight.to(dtype)
        for start, end in _chunks(len(hidden), len(weight), device):
            logits = rows[start:end] @ head.T
            losses[start:end] = _losses(logits, targets[start:end], precise, to_gradient=False)
            is_correct[start:end] = logits.argmax(-1) == targets[start:end]
    return losses, is_correct


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, count_correct: bool, grad_enabled: bool
    ) -> tuple[Tensor, Tensor]:
        # torch turns grad mode off inside `forward`, so the caller passes `grad_enabled`.
        hidden_needs_grad, weight_needs_grad = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        precise = torch.promote_types(hidden.dtype, torch.float32)
        head = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if hidden_needs_grad else None
        grad_weight = None
        if weight_needs_grad and len(hidden) == 0:
            grad_weight = torch.zeros_like(weight, dtype=precise)
        loss_sum = torch.zeros((), dtype=precise, device=hidden.device)
        num_correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        chunks = _chunks(len(hidden), len(weight), hidden.device.type)
        block_size = rows_within(BLOCK_BYTES, len(weight), hidden.device.type)
        largest = max((end - start for start, end in chunks), default=0)
        with logits_memory(largest, len(weight), hidden) as memory:
            for start, end in chunks:
                rows = hidden[start:end]
                logits = torch.mm(rows, head.T, out=memory[: end - start])  # (R, V)
                blocks = zip(logits.split(block_size), targets[start:end].split(block_size), strict=True)
                for block, target in blocks:
                    if count_correct:
                        num_correct += (block.argmax(dim=-1) == target).sum()
                    loss_sum += _losses(
                        block, target, precise, to_gradient=hidden_needs_grad or weight_needs_grad
                    ).sum()
                if grad_hidden is not None:
                    torch.mm(logits, head, out=grad_hidden[start:end])
                if weight_needs_grad:
                    grad_weight = _add_product(grad_weight, logits.T, rows, precise)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.gradient_dtype = (weight.grad_dtype if weight.is_leaf else None) or weight.dtype
        ctx.mark_non_differentiable(num_correct)
        return loss_sum, num_correct

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # In place: a copy of the weight's gradient would be another 0.6 GB at V = 151,936, D = 1024.
        scaled_hidden = None if grad_hidden is None else grad_hidden.mul_(grad_loss)
        scaled_weight = None if grad_weight is None else grad_weight.mul_(grad_loss).to(ctx.gradient_dtype)
        return scaled_hidden, scaled_weight, None, None, None


def _chunks(num_rows: int, vocab_size: int, device: str) -> list[tuple[int, int]]:
    """Split `num_rows` into as few chunks as the limit allows, all of about the same size."""
    count = -(-num_rows // rows_within(CHUNK_BYTES, vocab_size, device))
    edges = [num_rows * chunk // count for chunk in range(count + 1)] if count else []
    return list(pairwise(edges))


def rows_within(limits: dict[str, int], vocab_size: int, device: str) -> int:
    """Return how many rows of float32 logits `limits` allows on `device`."""
    return max(1, limits[device] // (4 * vocab_size))


def product_rows(width: int) -> int:
    """Return how many rows of the weight's gradient, (V, D) float32, `PRODUCT_BYTES` allows at this width."""
    return max(1, PRODUCT_BYTES // (4 * width))


def _losses(logits: Tensor, targets: Tensor, precise: torch.dtype, *, to_gradient: bool) -> Tensor:
    """Return the losses of the rows, (R,). With `to_gradient`, overwrite `logits` with the gradient of their sum."""
    log_probs = F.log_softmax(logits, dim=-1, dtype=precise)
    losses = -log_probs.gather(1, targets[:, None])[:, 0]
    if to_gradient:
        # The gradient is softmax - onehot. At the target compute it from the loss: in half precision a probability near
        # 1 rounds to 1, and the difference to 0. Under deterministic algorithms indexing has a deterministic kernel.
        torch.exp(log_probs, out=logits)
        logits[torch.arange(len(targets), device=logits.device), targets] = torch.expm1(-losses).to(logits.dtype)
    return losses


def _add_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `total + left @ right` in `dtype`: a half-precision product would round at every chunk.

    A given total is changed in place; None stands for 0.
    """
    if left.is_cuda and left.dtype != dtype:
        if total is None:
            return torch.mm(left, right, out_dtype=dtype)
        rows = product_rows(right.shape[1])
        for piece, factor in zip(total.split(rows), left.split(rows), strict=True):
            piece.add_(torch.mm(factor, right, out_dtype=dtype))
        return total
    left, right = left.to(dtype), right.to(dtype)  # CPU kernels cannot return a wider dtype
    return left @ right if total is None else total.addmm_(left, right)
