"""CPU kernels for torch's flash attention over packed documents, which has CUDA ones alone: documents one by one.

Registered with torch's own operators, so that all but the kernels is what runs on CUDA: the call, its derivative, the
state of the random generator that it returns, and what the compiler sees.
"""

from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.library import Library


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


def _precise(*states: Tensor) -> list[Tensor]:
    """As CUDA's kernels do, compute in float32 at least."""
    return [each.to(torch.promote_types(each.dtype, torch.float32)) for each in states]


def kept(heads: int, cu_seqlens: Tensor, dropout: float, rng_state: Tensor) -> list[Tensor]:
    """Return what each document's weights (H, L, L) are multiplied by, drawn from the state alone."""
    draw = torch.Generator().manual_seed(int(rng_state[0].item()))
    sizes = [at.stop - at.start for at in _documents(cu_seqlens)]
    return [(torch.rand(heads, L, L, generator=draw) >= dropout) / (1 - dropout) for L in sizes]


def _forward(  # noqa: PLR0917 - the operator's arguments
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    dropout: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float,
    **_: Any,
) -> Any:
    assert is_causal and not return_debug_mask and torch.equal(cu_seqlens, cu_seqlens_k)
    assert max_q == max_k == cu_seqlens.diff().max()
    # As on CUDA, only dropout takes something from the generator.
    seed = torch.randint(2**31, (1,)).item() if dropout else 0
    rng_state = torch.tensor([seed, 0], dtype=torch.uint64)
    out = torch.empty_like(query)
    query, key, value = _precise(query, *_one_each(query, key, value))
    for at, scaled in zip(_documents(cu_seqlens), kept(query.shape[1], cu_seqlens, dropout, rng_state), strict=True):
        out[at] = torch.einsum("hqs,shk->qhk", _weights(query[at], key[at], scale) * scaled, value[at])
    unused = torch.empty((), dtype=torch.uint64)
    return out, query.new_empty(query.shape[1], len(query)), rng_state, unused, query.new_empty(0)


def _backward(  # noqa: PLR0917 - the operator's arguments
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    dropout: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float,
    **_: Any,
) -> Any:
    results = [torch.empty_like(states) for states in (query, key, value)]  # with the strides of the inputs, as on CUDA
    grad, query, keys, values = _precise(grad, query, *_one_each(query, key, value))
    grads = [torch.empty_like(states) for states in (query, keys, values)]
    for at, scaled in zip(_documents(cu_seqlens), kept(query.shape[1], cu_seqlens, dropout, rng_state), strict=True):
        weights = _weights(query[at], keys[at], scale)
        grad_weights = torch.einsum("qhk,shk->hqs", grad[at], values[at]) * scaled
        grad_scores = weights * (grad_weights - (grad_weights * weights).sum(-1, keepdim=True)) * scale
        grads[0][at] = torch.einsum("hqs,shk->qhk", grad_scores, keys[at])
        grads[1][at] = torch.einsum("hqs,qhk->shk", grad_scores, query[at])
        grads[2][at] = torch.einsum("hqs,qhk->shk", weights * scaled, grad[at])
    folded = [g.unflatten(1, (key.shape[1], -1)).sum(2) for g in grads[1:]]
    return tuple(result.copy_(g) for result, g in zip(results, (grads[0], *folded), strict=True))


@cache
def register() -> Library:
    library = Library("aten", "IMPL")
    library.impl("_flash_attention_forward", _forward, "CPU")
    library.impl("_flash_attention_backward", _backward, "CPU")
    return library
