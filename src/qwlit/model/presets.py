"""Turn an Architecture into transformers' configuration and into a model on the meta device."""

from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from qwlit.core.errors import ConfigError
from qwlit.core.streams import without_stderr
from qwlit.model.config import Architecture
from qwlit.model.families import FAMILIES

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def to_hf_config(architecture: Architecture) -> "PretrainedConfig":
    """Turn an Architecture into transformers' configuration of its family.

    Raises:
        ConfigError: numbers of heads do not divide evenly, or head_dim is odd (rotary embeddings rotate pairs).
    """
    queries, keys = architecture.num_attention_heads, architecture.num_key_value_heads
    where = "model.architecture."
    head_dim = architecture.head_dim or attention_head_dim(
        architecture.hidden_size, queries, where=where, remedy=f"set {where}head_dim"
    )
    check_attention_heads(queries, keys, head_dim, where=where)
    family = FAMILIES[architecture.model_type]
    config_class, _ = family.classes()
    # An Architecture's fields have transformers' names, except for these two.
    values = asdict(architecture)
    del values["model_type"]
    rope = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
    return config_class(**values | {"head_dim": head_dim}, rope_parameters=rope, architectures=[family.class_name])


def attention_head_dim(hidden_size: int, queries: int, *, where: str, remedy: str) -> int:
    """Return the width of an attention head, hidden_size / queries.

    Raises:
        ConfigError: hidden_size is no multiple of queries; `where` names the file or setting of the numbers,
            `remedy` says where to set head_dim.
    """
    if hidden_size % queries:
        raise ConfigError(f"{where}hidden_size={hidden_size} is no multiple of num_attention_heads={queries}; {remedy}")
    return hidden_size // queries


def check_attention_heads(queries: int, keys: int, head_dim: int, *, where: str) -> None:
    """Raise ConfigError if the key heads do not divide the query heads, or the width of a head is odd."""
    if queries % keys:
        raise ConfigError(f"{where}num_key_value_heads={keys} must divide num_attention_heads={queries}.")
    if head_dim % 2:
        raise ConfigError(f"{where}head_dim={head_dim} must be even: rotary embeddings rotate pairs.")


def meta_causal_lm(config: "PretrainedConfig") -> "PreTrainedModel":
    """Build the model on the meta device: names, shapes and tied weights, without memory.

    Raises:
        ConfigError: transformers cannot build a model from a value in the configuration.
    """
    _, model_class = FAMILIES[config.model_type].classes()
    try:
        # What transformers warns of is in its error, or is a value that qwlit's own checks name.
        with torch.device("meta"), without_stderr():
            model = model_class(config)
    except Exception as error:  # transformers and torch raise errors of many kinds for a wrong value
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{config.name_or_path or 'model.architecture'}: no model can be built from the configuration"
            f" ({type(error).__name__}: {reason})"
        ) from None
    model.tie_weights()
    return model


def context_length(config: "PretrainedConfig") -> int:
    """Return the longest context of a model: max_position_embeddings, or more if the rotary embedding is scaled.

    For YaRN and other scalings, config.json states the length before scaling and a factor.
    """
    rope = config.rope_parameters or {}
    scaled = float(rope.get("factor") or 0) * int(rope.get("original_max_position_embeddings") or 0)
    return max(int(config.max_position_embeddings), int(scaled))
