"""Merge an adapter into the weights of its base, one tensor at a time, without a model in memory."""

from typing import TYPE_CHECKING

from safetensors import safe_open
from torch import Tensor

from qwlit.core.errors import ConfigError
from qwlit.inference.export import Weights
from qwlit.model.config import ModelConfig
from qwlit.model.families.decoder import HEAD
from qwlit.model.load import weights_folder
from qwlit.model.saved_adapter import SavedAdapter, merge_layer
from qwlit.model.weight_files import describe_differences, read_shapes, weight_files
from qwlit.model.weights import drawn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def base_weights(config: ModelConfig, model: "PreTrainedModel", *, seed: int) -> Weights:
    """Return the weights that a run or an adapter started from: those of the files, or the random ones of this seed.

    Args:
        model: the same model on the meta device, with or without adapters.

    Raises:
        ConfigError: the files are missing or damaged, or are those of another model.
    """
    parameters = {
        name.replace(".base_layer.", "."): list(parameter.shape)
        for name, parameter in model.named_parameters()
        if "lora_" not in name
    }
    folder = weights_folder(config)
    if folder is None:
        return Weights(parameters, lambda name: drawn(name, parameters[name], seed, model.config.initializer_range))
    headers = {file: read_shapes({file: names}) for file, names in weight_files(folder).items()}
    files = {name: file for file, found in headers.items() for name in found}
    shapes = {name: shape for found in headers.values() for name, shape in found.items()}
    if model.config.tie_word_embeddings:
        shapes.pop(HEAD, None)
    if differences := describe_differences(shapes, parameters, unexpected="unexpected"):
        raise ConfigError(f"{folder}: config.json and weights disagree. Tensors {differences}")

    def read(name: str) -> Tensor:
        with safe_open(str(files[name]), framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor

    return Weights(shapes, read)


def merged_weights(base: Weights, saved: SavedAdapter) -> Weights:
    """Return the base's weights with the adapter in them; sums and products are float32."""
    tensors, layers = saved.tensors(), set(saved.layers)

    def read(name: str) -> Tensor:
        if name in saved.replaced:
            return tensors[name]
        weight = base.read(name)
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and layer in layers:
            weight = weight.float()
            merge_layer(weight, saved, layer, tensors, (0, len(weight)))
        return weight

    return Weights(base.shapes, read)
