"""Variable-length attention for CPU, opaque to the compiler as torch's CUDA kernel is: documents one by one."""

from itertools import pairwise

import torch
from torch import Tensor


def _documents(cu_seqlens: Tensor) -> list[slice]:
    edges = cu_seqlens.tolist()
    return [slice(start, end) for start, end in pairwise(edges)]


def _weights(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """(L, H, K) each → (H, L, L)"""
    scores = torch.einsum("qhk,shk->hqs", query, key) * scale
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1)


@torch.library.custom_op("qwlit_tests::varlen", mutates_args=())
def attend(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for at in _documents(cu_seqlens):
        out[at] = torch.einsum("hqs,shk->qhk", _weights(query[at], key[at], scale), value[at])
    return out


@torch.library.custom_op("qwlit_tests::varlen_backward", mutates_args=())
def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grads = tuple(torch.empty_like(states, memory_format=torch.contiguous_format) for states in (query, key, value))
    for at in _documents(cu_seqlens):
        weights = _weights(query[at], key[at], scale)
        grad_weights = torch.einsum("qhk,shk->hqs", grad[at], value[at])
        grad_scores = weights * (grad_weights - (grad_weights * weights).sum(-1, keepdim=True)) * scale
        grads[0][at] = torch.einsum("hqs,shk->qhk", grad_scores, key[at])
        grads[1][at] = torch.einsum("hqs,qhk->shk", grad_scores, query[at])
        grads[2][at] = torch.einsum("hqs,qhk->shk", weights, grad[at])
    return grads


@attend.register_fake
def _(query: Tensor, *_: object) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@backward.register_fake
def _(grad: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(s, memory_format=torch.contiguous_format) for s in states[:3])


def _keep(ctx, inputs, output):
    *states, ctx.scale = inputs
    ctx.save_for_backward(*states)


attend.register_autograd(
    lambda ctx, grad: (*backward(grad.contiguous(), *ctx.saved_tensors, ctx.scale), None, None),
    setup_context=_keep,
)


def varlen(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, scaling: float) -> Tensor:
    """Stand in for `attention._varlen`: (1, T, H, K)."""
    groups = query.shape[1] // key.shape[1]
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    k, v = (states.repeat_interleave(groups, dim=1) for states in (k, v))
    return attend(q, k, v, cu_seqlens, scaling).unsqueeze(0)
