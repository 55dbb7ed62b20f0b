"""Freezing: parameters that keep their values and cost neither gradient nor optimizer state."""

from typing import TYPE_CHECKING

from qwlit.core.errors import ConfigError
from qwlit.core.patterns import names_in_layers, select
from qwlit.model.config import FreezeConfig
from qwlit.model.families import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def apply_freeze(model: "PreTrainedModel", freeze: FreezeConfig) -> None:
    """Freeze the parameters that `freeze` names, and train all others.

    Raises:
        ConfigError: a pattern matches no parameter, a ratio selects no layer, the model does not have the layers, or no
            parameter is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    num_layers = len(family_of(model).layers(model))
    frozen: set[str] = set()
    for pattern in freeze.parameters:
        frozen |= select(names, pattern, field="freeze.parameters")
    if freeze.layers is not None:
        frozen.update(names_in_layers(names, freeze.layers, field="freeze.layers"))
    lower = int(freeze.lower_layers_ratio * num_layers)
    if freeze.lower_layers_ratio and not lower:
        raise ConfigError(
            f"freeze.lower_layers_ratio={freeze.lower_layers_ratio} of {num_layers} layers is none;"
            " raise it, or set it to 0"
        )
    if lower:
        frozen.update(names_in_layers(names, (0, lower - 1), field="freeze.lower_layers_ratio"))
    if len(frozen) == len(names):
        raise ConfigError("freeze leaves nothing to train; take something out of freeze.parameters or freeze.layers")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
