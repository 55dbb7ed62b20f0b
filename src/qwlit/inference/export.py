"""Export the trained model as a folder for other tools: transformers 4 and 5, peft (LoRA adapters), vLLM, llama.cpp.

Files of the base model are copied; only files that training changed are written.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from transformers import PreTrainedModel

from qwlit.core.disk import naming_path
from qwlit.core.errors import GuardStop
from qwlit.inference.export_settings import EndToken, write_config, write_generation_config, write_tokenizer
from qwlit.model.families.decoder import HEAD
from qwlit.model.saved_adapter import ADAPTER_WEIGHTS, PREFIX
from qwlit.training.checkpointing.finite import find_nonfinite

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


def export_model(model: PreTrainedModel, folder: Path, *, sources: ExportSources, end: EndToken | None) -> None:
    """Write the whole model in the dtype of its base model, or only its adapter in float32.

    Args:
        end: the end token that the model learned; None to keep that of the base model.

    Raises:
        OSError: the folder cannot be written.
    """
    with naming_path(folder):
        _export(model, folder, sources, end)


def _export(model: PreTrainedModel, folder: Path, sources: ExportSources, end: EndToken | None) -> None:
    folder.mkdir(exist_ok=True)
    if hasattr(model, "peft_config"):
        _export_adapter(model, folder, sources.base)
    else:
        dtype = model.config.dtype or torch.float32
        _export_weights(model, folder, dtype)
        write_config(model.config, folder, base=sources.model, dtype=dtype, end=end)
    write_generation_config(model.config, folder, base=sources.model, end=end)
    if sources.tokenizer is not None:
        write_tokenizer(folder, sources.tokenizer, end=end)
    _set_default_permissions(folder)


def _set_default_permissions(folder: Path) -> None:
    """Give the weights the usual permissions of a new file.

    safetensors lets only the owner read them, and an inference server often runs as another user.
    """
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o666 & ~mask)


def _export_weights(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        # A tied head is the embedding. Converted below under its own name, it would become a second copy.
        del state[HEAD]
    state = {name: tensor.detach().to("cpu", dtype) for name, tensor in state.items()}
    _refuse_nonfinite(state)
    save_torch_state_dict(state, folder, max_shard_size=MAX_SHARD_SIZE)


def _export_adapter(model: PreTrainedModel, folder: Path, base: str | None) -> None:
    from peft import get_peft_model_state_dict

    config = model.peft_config["default"]
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(folder)
    # peft expects the names of its wrapper model; here the adapters are inside the model itself, without the prefix.
    state = {f"{PREFIX}{name}": t.detach().cpu() for name, t in get_peft_model_state_dict(model).items()}
    _refuse_nonfinite(state)
    save_file(state, folder / ADAPTER_WEIGHTS)


def _refuse_nonfinite(state: dict[str, torch.Tensor]) -> None:
    """Refuse weights that no model can use: they were not finite, or are not in this dtype."""
    if name := find_nonfinite(state):
        raise GuardStop(f"nothing is exported: {name} is not finite in {str(state[name].dtype).removeprefix('torch.')}")
