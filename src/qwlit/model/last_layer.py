"""The last decoder layer computes its feed-forward block only where the result is read: at the label positions.

Shapes: B rows, T positions, N label positions, D hidden.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from qwlit.model.families import family_of
from qwlit.model.families.decoder import ModelFamily

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def trim_last_layer(model: "PreTrainedModel") -> None:
    """Let the last layer, and with it the backbone, return only the positions that a call names."""
    family = family_of(model)
    layer = family.layers(model)[-1]
    layer.__class__ = _trimmed(type(layer), family)


def _trimmed(layer_class: type[nn.Module], family: ModelFamily) -> type[nn.Module]:
    # A subclass and not a function in `forward`'s place: transformers wraps checkpointing around a class's forward.
    class TrimmedLayer(layer_class):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Tensor, label_positions: Tensor | None = None, **kwargs: Any) -> Any:
            """Return (N, D) with `label_positions` (N,), which count through (B, T); else (B, T, D)."""
            if label_positions is None:
                return super().forward(hidden_states, **kwargs)
            return family.forward_label_positions(self, hidden_states, label_positions, **kwargs)

    return TrimmedLayer
