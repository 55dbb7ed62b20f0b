"""Write the JSON files and the tokenizer of an exported model for transformers 4 and 5 and tools built on them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qwlit.core.files import write_json_atomic, write_text_atomic
from qwlit.model.folder import (
    CHAT_TEMPLATE,
    DTYPE_KEYS,
    OTHER_TEMPLATES,
    TOKENIZER_CONFIG,
    TOKENIZER_PARTS,
    read_json_if_there,
    read_json_object,
    tokenizer_parts,
    without_code,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from qwlit.config.settings import GenerationSettings

Values = dict[str, Any]
GENERATION_CONFIG = "generation_config.json"
SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class EndToken:
    """The end token of the answers in the training data, and their chat template."""

    token: str
    """The token that ends an answer: <|im_end|> in conversations, <|endoftext|> in plain text."""
    token_id: int
    other_end_ids: tuple[int, ...]
    """Other ids that also end a text, such as that of <|endoftext|>."""
    chat_template: str | None
    """Jinja text of training's template; None if it is the one in the tokenizer's folder, or none was used."""
    sampling: Values = field(default_factory=dict)
    """How to answer: values of generation_config.json, see `sampling_values`; empty: as the base model."""


def sampling_values(settings: "GenerationSettings") -> Values:
    """Return the settings as keys that transformers 4 and 5 and vLLM read; min_p, which older ones lack, if it cuts."""
    values: Values = {"do_sample": settings.temperature > 0, "repetition_penalty": settings.repetition_penalty}
    if settings.temperature:
        values |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
        values |= {"min_p": settings.min_p} if settings.min_p else {}
    return values


def write_config(
    config: "PretrainedConfig", folder: Path, *, base: Path | None, dtype: torch.dtype, end: EndToken | None
) -> None:
    """Write config.json: the base model's values with the dtype of the weights and the new end token.

    The RoPE and dtype values are written under both names. transformers 4, and servers built on it, read `rope_theta`,
    `rope_scaling` and `torch_dtype` at the top level, and assume a RoPE base of 10,000 if they are missing.
    transformers 5 reads `rope_parameters` and `dtype`.
    """
    values = read_json_object(base / "config.json") if base else json.loads(config.to_json_string(use_diff=True))
    values = without_code(values)
    rope = dict(config.rope_parameters or {})
    values["rope_theta"] = rope.pop("rope_theta", None) or values.get("rope_theta")
    if rope.get("rope_type", "default") != "default":
        values["rope_scaling"] = rope
    name = str(dtype).removeprefix("torch.")
    values |= {"torch_dtype": name} | {key: name for key in DTYPE_KEYS if key in values}
    # Folders of fine-tuned models often have use_cache=false, but generation needs the KV cache.
    values["use_cache"] = True
    values.setdefault("architectures", config.architectures)
    if not values.get("quantization_config"):
        # transformers 5 refuses to load a model whose quantization_config is empty.
        values.pop("quantization_config", None)
    if end:
        values["eos_token_id"] = end.token_id
    write_json_atomic(folder / "config.json", values)


def write_generation_config(
    config: "PretrainedConfig", folder: Path, *, base: Path | None, end: EndToken | None
) -> None:
    """Write generation_config.json: the base model's values, the trained end token before the others, how to sample."""
    values = read_json_if_there(base / GENERATION_CONFIG) if base else {}
    if end is None and not values:
        return
    if end:
        if end.sampling:
            values = {key: value for key, value in values.items() if key not in SAMPLING} | end.sampling
        earlier = [*as_list(values.get("eos_token_id")), *as_list(config.eos_token_id), *end.other_end_ids]
        values["eos_token_id"] = list(dict.fromkeys([end.token_id, *earlier]))
        if values.get("pad_token_id") is None and end.other_end_ids:
            values["pad_token_id"] = end.other_end_ids[0]
    write_json_atomic(folder / GENERATION_CONFIG, values)


def as_list(value: Any) -> list[int]:
    """Return the ids of a key that may have none, one, or a list of them."""
    return [] if value is None else value if isinstance(value, list) else [value]


def write_tokenizer(folder: Path, source: Path, *, end: EndToken | None) -> None:
    """Copy the tokenizer's files, and set the end token and the chat template that training used."""
    for name in TOKENIZER_PARTS:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / OTHER_TEMPLATES, ignore_errors=True)
    for file in tokenizer_parts(source):
        copy = folder / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
    _change(folder / TOKENIZER_CONFIG, _for_transformers_4)
    if end is None:
        return
    _change(folder / TOKENIZER_CONFIG, lambda values: values | {"eos_token": end.token})
    if (folder / "special_tokens_map.json").is_file():
        _change(folder / "special_tokens_map.json", lambda values: values | {"eos_token": end.token})
    if end.chat_template is None:
        return
    shutil.rmtree(folder / OTHER_TEMPLATES, ignore_errors=True)
    if (folder / CHAT_TEMPLATE).is_file():
        write_text_atomic(folder / CHAT_TEMPLATE, end.chat_template)
        _change(folder / TOKENIZER_CONFIG, lambda values: {k: v for k, v in values.items() if k != "chat_template"})
    else:
        # Published folders have it here, and every version of transformers and llama.cpp's converter reads it.
        _change(folder / TOKENIZER_CONFIG, lambda values: values | {"chat_template": end.chat_template})


def _change(file: Path, change: Callable[[Values], Values]) -> None:
    """Rewrite a JSON file if `change` changes its values. Otherwise the copied file stays equal byte for byte."""
    values = read_json_if_there(file)
    changed = change(dict(values))
    if changed != values:
        write_json_atomic(file, changed)


def _for_transformers_4(values: Values) -> Values:
    """Leave out what names code, and replace entries of transformers 5 that transformers 4 cannot read."""
    values = without_code(values)
    extra = values.get("extra_special_tokens")
    if isinstance(extra, list):
        del values["extra_special_tokens"]
        values.setdefault("additional_special_tokens", extra)
    for name in ("is_local", "local_files_only"):
        values.pop(name, None)
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    return values
