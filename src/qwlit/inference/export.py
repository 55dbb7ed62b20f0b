"""Export the trained model as a folder for other tools: transformers 4 and 5, peft (LoRA adapters), vLLM, llama.cpp.

Files of the base model are copied; only files that training changed are written.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import PreTrainedModel

from qwlit.core.disk import naming_path
from qwlit.core.errors import GuardStop
from qwlit.core.files import replacing_folder, write_json_atomic
from qwlit.inference.export_settings import EndToken, write_config, write_generation_config, write_tokenizer
from qwlit.model.families.decoder import HEAD
from qwlit.model.folder import INDEX
from qwlit.model.saved_adapter import ADAPTER_WEIGHTS, PREFIX
from qwlit.training.checkpointing.finite import find_nonfinite
from qwlit.training.checkpointing.shards import safetensors_pieces, write_file

if TYPE_CHECKING:
    from transformers import PretrainedConfig

OnWritten = Callable[[str, Tensor], None]
MAX_SHARD_SIZE = "5GB"
"""Largest size of one safetensors file."""


@dataclass(frozen=True)
class ExportSources:
    """Where the export finds the files and names that training does not change."""

    model: Path | None
    """Folder of the base model; None if its weights were random."""
    tokenizer: Path | None
    """Folder of the tokenizer; None if the rows were tokens already and the settings name no tokenizer."""
    base: str | None
    """The base model in an adapter's configuration: an absolute path or a hub id; None for random weights."""


@dataclass(frozen=True)
class Weights:
    """Named tensors that are read or computed one at a time, so that no second copy of the model is in memory."""

    shapes: Mapping[str, Sequence[int]]
    read: Callable[[str], Tensor]


def weights_of(model: PreTrainedModel) -> Weights:
    """Return the weights of a model in memory."""
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        # A tied head is the embedding. Converted under its own name, it would become a second copy.
        del state[HEAD]
    return Weights({name: tensor.shape for name, tensor in state.items()}, state.__getitem__)


def export_model(model: PreTrainedModel, folder: Path, *, sources: ExportSources, end: EndToken | None) -> None:
    """Replace `folder` by the whole model in the dtype of its base model, or by its adapter in float32.

    Wait for another process that replaces it.

    Args:
        end: the end token that the model learned; None to keep that of the base model.

    Raises:
        OSError: the folder cannot be written.
    """
    with naming_path(folder), replacing_folder(folder, waits=True) as partial:
        if hasattr(model, "peft_config"):
            write_adapter(model, partial, sources=sources, end=end)
        else:
            write_model(model.config, weights_of(model), partial, sources=sources, end=end)


def write_model(
    config: "PretrainedConfig",
    weights: Weights,
    folder: Path,
    *,
    sources: ExportSources,
    end: EndToken | None,
    dtype: torch.dtype | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    on_written: OnWritten | None = None,
) -> None:
    """Write a whole model into an empty folder.

    Args:
        dtype: of the weights; None: the one that `config` names.
        on_written: called with the name and the values of each tensor that is in a file.

    Raises:
        OSError: the folder cannot be written.
        GuardStop: a weight is not finite in this dtype.
    """
    dtype = dtype or config.dtype or torch.float32
    _write_weights(weights, folder, dtype, max_shard_size, on_written)
    write_config(config, folder, base=sources.model, dtype=dtype, end=end)
    _write_settings(config, folder, sources, end)


def write_adapter(
    model: PreTrainedModel,
    folder: Path,
    *,
    sources: ExportSources,
    end: EndToken | None,
    on_written: OnWritten | None = None,
) -> None:
    """Write the model's adapter into an empty folder, float32. It raises what `write_model` raises."""
    from peft import get_peft_model_state_dict

    adapter = model.peft_config["default"]
    adapter.base_model_name_or_path = sources.base
    adapter.inference_mode = True
    adapter.save_pretrained(folder)
    # peft expects the names of its wrapper model; here the adapters are inside the model itself, without the prefix.
    state = {f"{PREFIX}{name}": tensor for name, tensor in get_peft_model_state_dict(model).items()}
    _write_file(state, state.__getitem__, folder / ADAPTER_WEIGHTS, on_written)
    _write_settings(model.config, folder, sources, end)


def _write_settings(config: "PretrainedConfig", folder: Path, sources: ExportSources, end: EndToken | None) -> None:
    write_generation_config(config, folder, base=sources.model, end=end)
    if sources.tokenizer is not None:
        write_tokenizer(folder, sources.tokenizer, end=end)


def _write_weights(
    weights: Weights, folder: Path, dtype: torch.dtype, max_shard_size: str, on_written: OnWritten | None
) -> None:
    """Write the files one after the other; one converted tensor at a time is in memory."""
    empty = {name: torch.empty(*shape, dtype=dtype, device="meta") for name, shape in weights.shapes.items()}
    plan = split_torch_state_dict_into_shards(empty, max_shard_size=max_shard_size)
    for file, names in plan.filename_to_tensors.items():
        _write_file({name: empty[name] for name in names}, weights.read, folder / file, on_written)
    if plan.is_sharded:
        write_json_atomic(folder / INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})


def _write_file(
    tensors: Mapping[str, Tensor], read: Callable[[str], Tensor], file: Path, on_written: OnWritten | None
) -> None:
    """Write the file; `tensors` gives shapes and dtypes, `read` the values."""

    def converted(name: str) -> Tensor:
        dtype = tensors[name].dtype
        tensor = read(name).detach().to("cpu", dtype).contiguous()
        if find_nonfinite({name: tensor}):
            # No model can use it: the weights were not finite, or are not in this dtype.
            raise GuardStop(f"nothing is exported: {name} is not finite in {str(dtype).removeprefix('torch.')}")
        if on_written:
            on_written(name, tensor)
        return tensor

    write_file(file, safetensors_pieces(tensors, converted))
