"""The last decoder layer computes its feed-forward block only where somebody reads the result: in supervised rows.

Attention needs keys and values of every token, but after the last one a row that is not learnt has no part in the loss.

Shapes: B rows, T positions, N supervised rows, D hidden.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def trim_last_layer(model: "PreTrainedModel") -> None:
    """Let the last layer, and with it the backbone, return only the rows that a call names in `label_positions`."""
    layer = model.model.layers[-1]
    layer.__class__ = _trimmed(type(layer))


def _trimmed(layer_class: type[nn.Module]) -> type[nn.Module]:
    # A subclass and not a function in `forward`'s place: transformers wraps checkpointing around a class's forward.
    class TrimmedLayer(layer_class):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Tensor, label_positions: Tensor | None = None, **kwargs: Any) -> Any:
            """Return (N, D) with `label_positions` (N,), which count through (B, T); else (B, T, D) as ever."""
            if label_positions is None:
                return super().forward(hidden_states, **kwargs)
            attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
            kept = (hidden_states + attended).flatten(0, 1).index_select(0, label_positions)
            return kept + self.mlp(self.post_attention_layernorm(kept))

    return TrimmedLayer
