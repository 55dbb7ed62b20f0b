"""Compute the last decoder layer's feed-forward block only at the label positions: nothing else reads its result.

Where 40 % of the tokens are supervised, this saves 1.1 % of a step's FLOPs (counted for Qwen3-0.6B and 8B). Compiled,
the last layer is a function of its own: compiling it as well took 9 s more of processor time (a small layer, training
and validation, on CPU), which a quarter of an hour of training earns.

Shapes: B sequences, T positions, N label positions, D hidden.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from qwlit.model.families import family_of
from qwlit.model.families.decoder import ModelFamily

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def restrict_last_ffn_to_labels(model: "PreTrainedModel") -> None:
    """Make the last layer return only the label positions if the call passes `label_positions`."""
    family = family_of(model)
    layer = family.layers(model)[-1]
    layer.__class__ = _with_label_positions(type(layer), family)


def _with_label_positions(layer_class: type[nn.Module], family: ModelFamily) -> type[nn.Module]:
    # A subclass and not another function as `forward`: transformers adds checkpointing to the `forward` of a class.
    class LayerWithLabelPositions(layer_class):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Tensor, label_positions: Tensor | None = None, **kwargs: Any) -> Any:
            """Return (N, D) with `label_positions` (N,), positions in the flattened B * T; without them (B, T, D)."""
            if label_positions is None:
                return super().forward(hidden_states, **kwargs)
            return family.forward_label_positions(self, hidden_states, label_positions, **kwargs)

    return LayerWithLabelPositions
