"""Compute the last decoder layer's feed-forward block only at the label positions: nothing else reads its result.

Shapes: B rows, T positions, N label positions, D hidden.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from qwlit.model.families import family_of
from qwlit.model.families.decoder import ModelFamily

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def trim_last_layer(model: "PreTrainedModel") -> None:
    """Make the last layer, and so the backbone, return only the label positions when a call passes them."""
    family = family_of(model)
    layer = family.layers(model)[-1]
    layer.__class__ = _trimmed(type(layer), family)


def _trimmed(layer_class: type[nn.Module], family: ModelFamily) -> type[nn.Module]:
    # A subclass and not another function as `forward`: transformers adds checkpointing to the `forward` of a class.
    class TrimmedLayer(layer_class):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Tensor, label_positions: Tensor | None = None, **kwargs: Any) -> Any:
            """Return (N, D) with `label_positions` (N,), positions in the flattened B * T; without them (B, T, D)."""
            if label_positions is None:
                return super().forward(hidden_states, **kwargs)
            return family.forward_label_positions(self, hidden_states, label_positions, **kwargs)

    return TrimmedLayer
