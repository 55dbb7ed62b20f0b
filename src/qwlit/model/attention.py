"""Causal attention within each packed document, registered with transformers under one name.

Shapes: B sequences, T positions, H query heads, G key/value heads (G divides H), K width of a head.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from qwlit.model.compile import uncompiled
from qwlit.model.config import AttentionKernel
from qwlit.model.inspection import Inspection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION_NAME = "qwlit"

aten = torch.ops.aten


def _causal_options() -> dict[str, Any]:
    """Return varlen_attn's arguments for causal attention with grouped heads; torch versions name them differently."""
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:  # older kernels group heads without this argument
        options["enable_gqa"] = True
    return options


VARLEN_OPTIONS = _causal_options()


def attend(  # noqa: PLR0913 - transformers calls it
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    attention_kernel: AttentionKernel | None = None,
    cu_seqlens: Tensor | None = None,
    document_lengths: tuple[int, ...] | None = None,
    max_seqlen: int = 0,
    inspection: Inspection | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend causally, within each packed document or each right-padded sequence.

    Right padding needs no mask: a real token never looks to its right, and nothing reads a padding token's output.

    Args:
        query: (B, H, T, K). `key` and `value` are (B, G, T, K).
        scaling: factor on the scores before the softmax.
        dropout: probability on the attention weights; transformers passes 0 outside training.
        cu_seqlens, document_lengths, max_seqlen: as in MicroBatch. varlen reads cu_seqlens and max_seqlen; sdpa and
            eager read document_lengths. If cu_seqlens and document_lengths are None, the sequences are padded.
        inspection: takes queries and keys of padded sequences.

    Returns:
        (B, T, H, K), and None where transformers expects the weights.

    Raises:
        RuntimeError: the caller is not LossModel; this function would silently ignore the caller's masks or caches.
    """
    if attention_kernel is None or attention_mask is not None:
        raise RuntimeError("only LossModel may call this attention; call the model inside generation_attention(model)")
    if inspection is not None:
        inspection.observe_attention(query, key, scaling)
    if attention_kernel == "varlen" and cu_seqlens is not None:
        return _varlen(query, key, value, cu_seqlens, max_seqlen, scaling, dropout), None
    compute = _eager if attention_kernel == "eager" else _sdpa
    if document_lengths is None:
        return compute(query, key, value, scaling, dropout).transpose(1, 2).contiguous(), None
    # One call per document. Batches of documents would not be faster, because they copy queries, keys and values (two
    # CPU cores, 30 documents of 40-80 tokens, forward and backward: 4.2 ms one by one, 4.6-8.6 ms in batches).
    lengths = list(document_lengths)
    documents = zip(*(torch.split(states, lengths, dim=2) for states in (query, key, value)), strict=True)
    return torch.cat([compute(q, k, v, scaling, dropout).transpose(1, 2) for q, k, v in documents], dim=1), None


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
    """Attend with torch's fused kernels: (B, H, T, K)."""
    if query.is_cuda and _compute_dtype(value) == torch.float32:
        # CUDA's only fused kernel for float32 cannot group heads: sdpa would fall back to the whole score matrix.
        key, value = _repeat_key_value_heads(query, key, value)
    return F.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )


def _eager(query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
    """Attend by the definition, softmax in float32 (float64 stays float64): (B, H, T, K)."""
    key, value = _repeat_key_value_heads(query, key, value)
    scores = (query @ key.transpose(2, 3)) * scaling
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
    precise = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1, dtype=precise).to(value.dtype)
    return F.dropout(weights, dropout) @ value


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, scaling: float, dropout: float
) -> Tensor:
    """Attend with torch's variable-length flash kernel, CUDA in half precision only: (1, T, H, K)."""
    # Autocast converts the inputs of sdpa but not of this kernel, and Qwen3's norms return float32 queries and keys.
    dtype = _compute_dtype(value)
    q, k, v = (states.squeeze(0).transpose(0, 1).to(dtype) for states in (query, key, value))
    if dropout:
        return _flash_with_dropout(q, k, v, cu_seqlens, max_seqlen, scaling, dropout).unsqueeze(0)
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scaling, **VARLEN_OPTIONS)
    return out.unsqueeze(0)  # type: ignore[union-attr]


def _flash_with_dropout(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scaling: float, dropout: float
) -> Tensor:
    """Call the operator below `varlen_attn`, which itself always passes it a dropout of 0: (T, H, K).

    The kernel keeps no mask. It draws from CUDA's generator and returns the state that it drew from, and the backward
    pass draws the same mask again. It compares 8 random bits, so it drops `dropout` rounded up to 1/256 (0.05: 13/256),
    and scales what is left by 1 / (1 - dropout).

    Args:
        q: (T, H, K). `k` and `v` are (T, G, K).
    """
    is_causal, returns_mask = True, False
    out: Tensor = aten._flash_attention_forward(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout, is_causal, returns_mask, scale=scaling
    )[0]
    return out


def _repeat_key_value_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat key and value heads until every query head has its own: (B, H, T, K) each."""
    groups = query.shape[1] // key.shape[1]
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


def _compute_dtype(states: Tensor) -> torch.dtype:
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def register_attention() -> str:
    """Register `attend` with transformers and return its name, for `_attn_implementation`."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, attend)
    return ATTENTION_NAME


@contextmanager
def generation_attention(model: "PreTrainedModel") -> Iterator[None]:
    """Let `model` generate in the block: it uses torch's sdpa with transformers' masks and caches."""
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        with uncompiled(model):
            yield
    finally:
        model.set_attn_implementation(before)
