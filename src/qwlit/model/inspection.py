"""Numbers from inside one forward pass of LossModel that show how healthy the model is.

Shapes: B sequences, T positions, N label positions, H query heads, G key heads, K width of a head, V vocabulary.
"""

import torch
from torch import Tensor


class Inspection:
    """Filled by `LossModel.forward`. Nothing here waits for the device."""

    logits: Tensor
    """(N, V) float32, at the label positions."""

    def __init__(self, lengths: Tensor) -> None:
        """`lengths`: (B,) tokens of each sequence, without padding."""
        self._lengths = lengths
        self._attention_logits: list[Tensor] = []

    @property
    def max_attention_logit(self) -> Tensor:
        """The largest attention logit of all layers, float32 scalar."""
        return torch.stack(self._attention_logits).amax()

    def observe_attention(self, query: Tensor, key: Tensor, scaling: float) -> None:
        """Take the queries (B, H, T, K) and keys (B, G, T, K) of a layer."""
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = (query.float() @ key.float().transpose(2, 3)) * scaling  # (B, H, T, T)
        positions = torch.arange(scores.shape[-1], device=scores.device)
        causal = positions[None, :] <= positions[:, None]
        is_token = positions < self._lengths[:, None]  # (B, T)
        seen = causal & is_token[:, None, :, None]
        self._attention_logits.append(torch.where(seen, scores, -torch.inf).amax().float())
