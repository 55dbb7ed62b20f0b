"""The trained model as a folder that other tools load: transformers, or peft for a LoRA adapter."""

import copy
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar


def export_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path, *, base: str | None
) -> None:
    """Write the whole model in the dtype its checkpoint came in, or only its adapter in float32.

    Args:
        base: where the adapter's frozen model came from, so that peft finds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    disable_progress_bar()
    if hasattr(model, "peft_config"):
        _export_adapter(model, folder, base)
    else:
        _export_whole(model, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _export_whole(model: PreTrainedModel, folder: Path) -> None:
    config = copy.deepcopy(model.config)
    # Training runs without a cache; whoever generates with the exported model wants one.
    config.use_cache = True
    dtype = config.dtype or torch.float32
    state = {name: tensor.detach().to("cpu", dtype) for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state)
    # save_pretrained has written the dtype of the weights in memory, which training keeps in float32.
    config.dtype = dtype
    config.save_pretrained(folder)


def _export_adapter(model: PreTrainedModel, folder: Path, base: str | None) -> None:
    from peft import get_peft_model_state_dict
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    config = model.peft_config["default"]
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(folder)
    # peft reads the names its wrapper gives; here the layers stand in the model itself.
    state = {f"base_model.model.{name}": t.detach().cpu() for name, t in get_peft_model_state_dict(model).items()}
    save_file(state, folder / SAFETENSORS_WEIGHTS_NAME)
