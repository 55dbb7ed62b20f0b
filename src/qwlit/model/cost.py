"""What a model costs in memory, from its shape alone."""

from qwlit.model.config import AdapterConfig, ModelConfig
from qwlit.model.load import model_shape
from qwlit.model.presets import meta_causal_lm

# Weight, gradient and AdamW's two moments, each float32.
BYTES_A_TRAINED_PARAMETER = 16


def training_state_bytes(
    model: ModelConfig, adapter: AdapterConfig, amsgrad: bool, bytes_a_frozen_parameter: int
) -> int:
    """Return what weights, gradients and optimizer take on one device that holds all of them.

    An adapter's own parameters are left out: they are a hundredth of what it stands beside.
    """
    count: int = sum(parameter.numel() for parameter in meta_causal_lm(model_shape(model)).parameters())
    trained = BYTES_A_TRAINED_PARAMETER + 4 * amsgrad
    return count * (trained if adapter.kind == "none" else bytes_a_frozen_parameter)
