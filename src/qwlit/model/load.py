"""Load the tokenizer and the causal LM of a ModelConfig: from a local folder, from the hub, or with random weights.

Weights come from safetensors files only. They are read one tensor at a time into an empty model, so there is never a
second copy, and an error can name every missing, unexpected or damaged tensor.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qwlit.core.errors import ConfigError, naming_errors
from qwlit.core.files import resolve_path
from qwlit.core.streams import without_stderr
from qwlit.model import hub
from qwlit.model.config import FreezeConfig, ModelConfig
from qwlit.model.families import FAMILIES, family_of
from qwlit.model.folder import (
    DTYPE_KEYS,
    check_tokenizer_files,
    declared_dtype,
    has_tokenizer,
    read_json_if_there,
    read_json_object,
    read_model_config,
    without_code,
)
from qwlit.model.freeze import apply_freeze
from qwlit.model.presets import attention_head_dim, check_attention_heads, meta_causal_lm, to_hf_config
from qwlit.model.saved_adapter import ADAPTER_WEIGHTS
from qwlit.model.weight_files import fingerprint_files, stored_dtype, weight_files
from qwlit.model.weights import OnWeightWritten, draw_weights, fill_weights

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast


def load_tokenizer(config: ModelConfig) -> "PreTrainedTokenizerFast":
    """Load `model.tokenizer`, or the model's own.

    Raises:
        ConfigError: no setting names a tokenizer, its files are missing or damaged, or cannot be fetched from the hub.
    """
    folder, field = tokenizer_folder(config)
    check_tokenizer_files(folder, field)
    from transformers import AutoTokenizer

    # Pass a config, so that transformers does not read the folder's config.json, which it may reject.
    model_type = str(read_json_if_there(folder / "config.json").get("model_type"))
    given = {"config": FAMILIES[model_type].classes()[0]()} if model_type in FAMILIES else {}

    def unreadable(reason: str) -> ConfigError:
        return ConfigError(f"{field}={folder}: the tokenizer cannot be read ({reason}); copy it again")

    with naming_errors(unreadable), without_stderr():
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **given)


def tokenizer_folder(config: ModelConfig) -> tuple[Path, str]:
    """Return the tokenizer's folder and the setting that names it.

    If an adapter's folder has a tokenizer, it is the one that the adapter was trained with.

    Raises:
        ConfigError: no setting names a tokenizer, or the hub cannot be reached.
    """
    if config.tokenizer:
        folder = resolve_path(config.tokenizer)
        if not folder.is_dir() and hub.looks_like_hub_id(config.tokenizer):
            folder = hub.fetch(config.tokenizer, hub.TOKENIZER_FILES, config.hub)
        return folder, "model.tokenizer"
    if config.adapter_path and has_tokenizer(resolve_path(config.adapter_path)):
        return resolve_path(config.adapter_path), "model.adapter_path"
    own = _folder(config, hub.TOKENIZER_FILES)
    if own is None:
        raise ConfigError("model.tokenizer is not set, and there is no model.path or model.hub_id to take it from")
    return own, "model.path" if config.path else "model.hub_id"


def vocabulary_size(config: ModelConfig) -> int:
    """Return the number of rows of the embedding."""
    return int(model_shape(config).vocab_size)


def check_vocabulary(config: ModelConfig, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Refuse a tokenizer with more tokens than the embedding has rows.

    Raises:
        ConfigError: an id of the tokenizer would have no embedding.
    """
    rows = vocabulary_size(config)
    if len(tokenizer) > rows:
        owner = "model.adapter_path's" if config.adapter_path and not config.tokenizer else "the"
        raise ConfigError(
            f"{owner} tokenizer has {len(tokenizer)} tokens and the embedding {rows} rows; "
            "set model.tokenizer to the model's own, or with model.init=random raise model.architecture.vocab_size"
        )


def empty_causal_lm(
    config: ModelConfig, *, freeze: FreezeConfig | None, frozen_dtype: torch.dtype
) -> "PreTrainedModel":
    """Build the model with uninitialized weights, on the CPU, with qwlit's attention and without a KV cache.

    The weights take memory only when `fill_causal_lm` writes them.

    Args:
        freeze: which parameters are not trained; None: all of them. Trained weights are float32 in every case.
        frozen_dtype: the dtype of frozen weights.

    Raises:
        ConfigError: something is wrong with the folder, or the hub cannot be reached.
    """
    from qwlit.model.attention import register_attention

    folder = weights_folder(config)
    if config.init == "pretrained" and folder is None:
        raise ConfigError("model.init=pretrained needs model.path or model.hub_id; or set model.init=random")
    hf_config = model_shape(config) if folder is None else _read_hf_config(folder)
    hf_config._attn_implementation = register_attention()
    model: Any = meta_causal_lm(hf_config)
    if freeze is None:
        model.requires_grad_(False)
    else:
        apply_freeze(model, freeze)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else frozen_dtype)
    model.to_empty(device="cpu")
    model.tie_weights()
    family_of(model).rebuild_rotary(model)
    if folder is not None:
        model.config.dtype = model.config.dtype or stored_dtype(folder)
        model.generation_config = _read_generation_config(folder) or model.generation_config
    model.config.use_cache = False
    # transformers built this from config.json, where fine-tuned folders often have use_cache=false. Without the cache
    # each generated token takes as long as a forward pass over all tokens before it.
    model.generation_config.use_cache = True
    return model


def _read_generation_config(folder: Path) -> "GenerationConfig | None":
    """Read generation_config.json; return None if there is no such file.

    Raises:
        ConfigError: the file cannot be read, or a value is wrong.
    """
    file = folder / "generation_config.json"
    if not file.is_file():
        return None
    from transformers import GenerationConfig

    values = read_json_object(file)
    for key in ("eos_token_id", "pad_token_id", "bos_token_id"):
        ids = values.get(key)
        if not all(type(token) is int for token in (ids if isinstance(ids, list) else [ids]) if token is not None):
            raise ConfigError(f"{file}: {key}={ids!r} must be a token's id, or a list of ids")
    try:
        return GenerationConfig.from_dict(values)
    except Exception as error:  # transformers raises errors of many kinds for a wrong value
        raise ConfigError(f"{file}: {' '.join(str(error).split())}") from None


def weights_folder(config: ModelConfig) -> Path | None:
    """Return the folder of the pretrained weights; None if the weights are random.

    Raises:
        ConfigError: the hub cannot be reached, or does not have the model.
    """
    return _folder(config, hub.MODEL_FILES) if config.init == "pretrained" else None


def _folder(config: ModelConfig, patterns: list[str]) -> Path | None:
    if config.path:
        return resolve_path(config.path)
    return hub.fetch(config.hub_id, patterns, config.hub) if config.hub_id else None


def model_shape(config: ModelConfig) -> "PretrainedConfig":
    """Return the model's configuration, without weights.

    It comes from config.json in model.path, else from model.architecture, else from config.json on the hub.
    """
    if config.architecture and not config.path:
        return to_hf_config(config.architecture)
    folder = _folder(config, hub.CONFIG_FILES)
    if folder is None:
        raise ConfigError("no model is named: set model.path, model.hub_id or model.architecture")
    return _read_hf_config(folder)


def _read_hf_config(folder: Path) -> "PretrainedConfig":
    values = read_model_config(folder)
    config_class, _ = FAMILIES[values["model_type"]].classes()
    file = folder / "config.json"
    values = {key: v for key, v in without_code(values).items() if _is_read(config_class, key)} | {
        "dtype": declared_dtype(values)
    }
    try:
        with without_stderr():
            config = config_class.from_dict(values)
    except Exception as error:  # transformers and the hub client raise errors of many kinds for a wrong value
        raise ConfigError(f"{file}: {' '.join(str(error).split())}") from None
    queries = config.num_attention_heads
    # Qwen2's published files do not have head_dim; transformers computes it in each layer.
    head_dim = getattr(config, "head_dim", None) or attention_head_dim(
        config.hidden_size, queries, where=f"{file}: ", remedy=f"set head_dim in {file}"
    )
    check_attention_heads(queries, config.num_key_value_heads, head_dim, where=f"{file}: ")
    config.head_dim = head_dim
    # Read it here, so that every subcommand finds a damaged file before the training, and not the export after it.
    _read_generation_config(folder)
    config.name_or_path = str(folder)
    return config


def _is_read(config_class: Any, key: str) -> bool:
    """Whether a key of config.json goes to transformers: not the dtype, names of classes of a classifier's answers, and
    names that would replace a method."""
    if key in (*DTYPE_KEYS, "num_labels", "id2label", "label2id"):
        return False
    return not key.startswith("_") and not callable(getattr(config_class, key, None))


def fingerprint(config: ModelConfig) -> str | None:
    """Return a fingerprint of the pretrained weights and of model.adapter_path; None if the weights are random."""
    folder = weights_folder(config)
    if folder is None:
        return None
    base = fingerprint_files(weight_files(folder))
    if config.adapter_path is None:
        return base
    return f"{base}+{fingerprint_files({resolve_path(config.adapter_path) / ADAPTER_WEIGHTS: None})}"


def fill_causal_lm(
    model: "PreTrainedModel", config: ModelConfig, *, seed: int, on_weight_written: OnWeightWritten | None = None
) -> None:
    """Write the weights into a model of `empty_causal_lm`, sharded or not.

    Args:
        seed: of random weights.
        on_weight_written: called with the name of each weight after it is written.

    Raises:
        ConfigError: see `fill_weights`.
    """
    folder = weights_folder(config)
    if folder is None:
        draw_weights(model, seed=seed, std=model.config.initializer_range, on_weight_written=on_weight_written)
    else:
        fill_weights(model, folder, tied=model.config.tie_word_embeddings, on_weight_written=on_weight_written)
