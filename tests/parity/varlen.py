"""CPU kernels for torch's variable-length attention, which has CUDA ones alone: documents one by one.

Registered with torch's own operators, so that all but the kernels is what runs on CUDA: the call, its derivative, and
what the compiler sees.
"""

from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen


def _documents(cu_seqlens: Tensor) -> list[slice]:
    return [slice(start, end) for start, end in pairwise(cu_seqlens.tolist())]


def _weights(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """(L, H, K) each → (H, L, L)"""
    scores = torch.einsum("qhk,shk->hqs", query, key) * scale
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1)


def _one_each(query: Tensor, *grouped: Tensor) -> list[Tensor]:
    """Repeat key and value heads until every query head has its own."""
    return [states.repeat_interleave(query.shape[1] // states.shape[1], dim=1) for states in grouped]


def _forward(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, *rest: Any, **named: Any) -> Any:
    # The scale is the second number behind the two lengths and "is causal".
    scale = named["scale"] if "scale" in named else rest[4]
    key, value = _one_each(query, key, value)
    out = torch.empty_like(query)
    for at in _documents(cu_seqlens):
        out[at] = torch.einsum("hqs,shk->qhk", _weights(query[at], key[at], scale), value[at])
    return out, query.new_empty(query.shape[1], len(query)), torch.empty(2, dtype=torch.uint64)


def _backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *rest: Any) -> Any:
    cu_seqlens, scale = rest[0], next(number for number in rest[::-1] if isinstance(number, float))
    keys, values = _one_each(query, key, value)
    grads = [torch.empty_like(states) for states in (query, keys, values)]
    for at in _documents(cu_seqlens):
        weights = _weights(query[at], keys[at], scale)
        grad_weights = torch.einsum("qhk,shk->hqs", grad[at], values[at])
        grad_scores = weights * (grad_weights - (grad_weights * weights).sum(-1, keepdim=True)) * scale
        grads[0][at] = torch.einsum("hqs,shk->qhk", grad_scores, keys[at])
        grads[1][at] = torch.einsum("hqs,qhk->shk", grad_scores, query[at])
        grads[2][at] = torch.einsum("hqs,qhk->shk", weights, grad[at])
    folded = (g.unflatten(1, (key.shape[1], -1)).sum(2) for g in grads[1:])
    return (grads[0], *folded)


@cache
def register() -> None:
    varlen._varlen_attn.register_kernel("cpu")(_forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(_backward)
