"""Head and loss in one: cross-entropy of supervised rows without ever holding all logits.

At a vocabulary of 151,936 the logits are the largest tensor of a run. They are made a chunk of rows at a time; since a
loss's gradient is known as soon as its logits are, it is computed there and then, and backward only scales it.

Shapes: N supervised rows, R rows of a chunk, D hidden, V vocabulary.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Bytes of a chunk's float32 logits. At V = 151,936: 2,208 rows on CUDA, 220 on CPU. More rows gain nothing there, fewer
# make the matrix products inefficient.
CHUNK_BYTES = {"cuda": 5 * 2**28}
CPU_CHUNK_BYTES = 2**27


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, count_correct: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the sum of cross-entropies of `hidden @ weight.T` against `targets`, and how many argmaxes are right.

    The matrix products run in autocast's dtype, or hidden's without autocast; the softmax in float32 (float64 stays).

    Args:
        hidden: (N, D); N may be 0, which gives a zero that still reaches every parameter.
        weight: (V, D), the head's; gets no gradient, at no cost, when it requires none.
        targets: (N,) int64.
        count_correct: argmax is another pass over the logits; without it the count is 0.

    Returns:
        loss_sum, a float32 scalar in nats; num_correct, an int64 scalar.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call, no-any-return]
            hidden.to(dtype), weight, targets, count_correct, torch.is_grad_enabled()
        )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, count_correct: bool, grad_enabled: bool
    ) -> tuple[Tensor, Tensor]:
        # Grad mode is always off in here, so the caller has to say.
        hidden_needs, weight_needs = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        precise = torch.promote_types(hidden.dtype, torch.float32)
        head = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if hidden_needs else None
        grad_weight = torch.zeros_like(weight, dtype=precise) if weight_needs else None
        loss_sum = torch.zeros((), dtype=precise, device=hidden.device)
        num_correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        for start, end in _chunks(len(hidden), len(weight), hidden.device.type):
            rows, target = hidden[start:end], targets[start:end, None]
            logits = rows @ head.T  # (R, V)
            if count_correct:
                num_correct += (logits.argmax(dim=-1, keepdim=True) == target).sum()
            log_probs = F.log_softmax(logits, dim=-1, dtype=precise)
            losses = -log_probs.gather(1, target)  # (R, 1)
            loss_sum += losses.sum()
            if grad_hidden is None and grad_weight is None:
                continue
            # d loss / d logits = softmax - onehot; at the target taken from the loss, because half precision rounds the
            # probability of a sure model to 1 and the difference to 0.
            gradient = torch.exp(log_probs, out=logits)
            # Indexing has a deterministic CUDA kernel when one is asked for.
            gradient[torch.arange(end - start, device=hidden.device), target[:, 0]] = torch.expm1(-losses[:, 0]).to(
                gradient.dtype
            )
            if grad_hidden is not None:
                torch.mm(gradient, head, out=grad_hidden[start:end])
            if grad_weight is not None:
                _add_product(grad_weight, gradient.T, rows)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(num_correct)
        return loss_sum, num_correct

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # In place: a copy of the weight's gradient would be another 0.6 GB at V = 151,936, D = 1024.
        scaled_hidden = None if grad_hidden is None else grad_hidden.mul_(grad_loss)
        scaled_weight = None if grad_weight is None else grad_weight.mul_(grad_loss).to(ctx.weight_dtype)
        return scaled_hidden, scaled_weight, None, None, None


def _chunks(num_rows: int, vocab_size: int, device: str) -> list[tuple[int, int]]:
    """Cut `num_rows` into the fewest chunks within the limit, all of about the same size."""
    limit = max(1, CHUNK_BYTES.get(device, CPU_CHUNK_BYTES) // (4 * vocab_size))
    count = -(-num_rows // limit)
    edges = [num_rows * chunk // count for chunk in range(count + 1)] if count else []
    return list(pairwise(edges))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right` to `total`, rounding only once: a half-precision product would round at every chunk."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        total.add_(torch.mm(left, right, out_dtype=total.dtype))
    else:  # CPU kernels cannot widen
        total.addmm_(left.to(total.dtype), right.to(total.dtype))
