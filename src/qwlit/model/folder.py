"""Read config.json and check the tokenizer of a local Hugging Face folder; name what is wrong in one line."""

import os
from pathlib import Path
from typing import Any

from qwlit.core.errors import ConfigError, nearest
from qwlit.core.files import load_json, read_small_text, resolve_path
from qwlit.model.families import FAMILIES
from qwlit.model.hub import looks_like_hub_id

TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
OTHER_TEMPLATES = "additional_chat_templates"
TOKENIZER_PARTS = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    CHAT_TEMPLATE,
)
ADAPTER_CONFIG = "adapter_config.json"
DTYPE_KEYS = ("dtype", "torch_dtype")
"""transformers 5's name and transformers 4's."""
DTYPES = ("float32", "bfloat16", "float16", "float64")
FULL_ATTENTION = "full_attention"
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
LARGEST_JSON = 2**26
"""Bytes; the index of a model with a million tensors has about that many."""
SIZES = {
    "vocab_size": 2**24,
    "hidden_size": 2**17,
    "intermediate_size": 2**19,
    "num_hidden_layers": 2**10,
    "num_attention_heads": 2**10,
    "num_key_value_heads": 2**10,
}
"""Keys that every published config.json has, with at least eight times the largest published value. For a missing key
transformers would use the value of a 7B model."""


def check_folder(folder: Path, field: str) -> None:
    """Refuse a setting that names no folder; the error suggests the nearest name beside it.

    Raises:
        ConfigError: `folder` does not exist or is a file.
    """
    if folder.is_dir():
        return
    if folder.exists():
        raise ConfigError(f"{field}={folder} is a file; give the Hugging Face folder that contains it")
    parent = folder.absolute().parent
    siblings = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
    hint = nearest(folder.name, siblings)
    if field == "model.path" and not hint and looks_like_hub_id(str(folder)):
        hint = f" A model on the hub is model.hub_id={folder}."
    raise ConfigError(f"{field}={folder}: no such folder.{hint}")


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ConfigError: the file cannot be read, or holds no JSON object.
    """
    try:
        if (size := file.stat().st_size) > LARGEST_JSON:
            raise ValueError(f"it has {size:,} bytes, more than {LARGEST_JSON:,}")
        value = load_json(read_small_text(file))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as JSON ({error}); copy or download it again") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{file} is no JSON object; copy or download it again")
    return value


def read_json_if_there(file: Path) -> dict[str, Any]:
    """Read a JSON object; return {} if there is no such file. It raises what `read_json_object` raises."""
    return read_json_object(file) if file.is_file() else {}


def read_model_config(folder: Path) -> dict[str, Any]:
    """Read and check config.json.

    Raises:
        ConfigError: there is no folder or no config.json, or it describes a model that qwlit cannot train.
    """
    check_folder(folder, "model.path")
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(f"model.path={folder} {_what_it_is(folder)}")
    config = read_json_object(file)
    model_type = str(config.get("model_type"))
    family = FAMILIES.get(model_type)
    names = config.get("architectures") or [family.class_name if family else model_type]
    if family is None or names != [family.class_name]:
        named = ", ".join(map(str, names)) if isinstance(names, list) else str(names)
        found = f"{named} (model_type {model_type})"
        known = " and ".join(family.class_name for family in FAMILIES.values())
        raise ConfigError(f"model.path={folder} is a {found}; qwlit trains {known}")
    for check in (_check_sizes, _check_attention, _check_weights, _check_dtype, _check_rope, _check_pad_token):
        check(file, config)
    return config


def without_code(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of config.json or tokenizer_config.json without those that name code, here or on the hub.

    With `auto_map`, libraries import a Python file of the folder; with `attn_implementation`, transformers downloads
    kernels and runs them.
    """
    return {key: value for key, value in values.items() if key != "auto_map" and not key.endswith("_implementation")}


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds a peft adapter and no weights of a model; some trainers add a config.json to it."""
    return (folder / ADAPTER_CONFIG).is_file() and not any((folder / name).is_file() for name in (WEIGHTS, INDEX))


def named_base(adapter: Path) -> Any:
    """Return the base model that an adapter's folder names: a folder, a hub id or None."""
    return read_json_object(adapter / ADAPTER_CONFIG).get("base_model_name_or_path")


def base_of(adapter: Path) -> dict[str, str | None]:
    """Return model.path and model.hub_id for the base model that an adapter's folder names.

    Raises:
        ConfigError: the adapter names no base, or a folder that does not exist here.
    """
    base = named_base(adapter)
    if isinstance(base, str):
        # A relative path is relative to the folder in which the adapter was trained, or to the adapter's folder.
        for candidate in (resolve_path(base), adapter / base):
            # Not Path.is_dir, which raises for a name that is too long.
            if os.path.isdir(candidate):  # noqa: PTH112
                return {"path": str(candidate), "hub_id": None}
    if isinstance(base, str) and looks_like_hub_id(base):
        return {"path": None, "hub_id": base}
    said = f"names the base {base}, and there is no such folder here" if base else "names no base"
    raise ConfigError(
        f"model.path={adapter} is a peft adapter that {said}; set model.path=BASE model.adapter_path={adapter}"
    )


def _what_it_is(folder: Path) -> str:
    """Say what a folder without config.json is, and what to set instead."""
    if is_adapter(folder):
        return "is a peft adapter; give its base model as model.path and this folder as model.adapter_path"
    candidates = (folder.absolute(), *folder.absolute().parents[:2])
    run = next((candidate for candidate in candidates if (candidate / "config.yaml").is_file()), None)
    if run is None and (folder / "MANIFEST.json").is_file():
        return "is a checkpoint of qwlit without its run; give the run's export/ folder"
    if run is None:
        return "has no config.json; give a Hugging Face model folder"
    what = "is a run of qwlit" if run == candidates[0] else "belongs to a run of qwlit"
    if not (run / "export").is_dir():
        return f"{what} that has not ended; train it to its end, which writes {run / 'export'}"
    return f"{what}; to start from the model that it trained, set model.path={run / 'export'}"


def _check_sizes(file: Path, config: dict[str, Any]) -> None:
    for key, largest in SIZES.items():
        value = config.get(key)
        if key not in config:
            said = f"there is no {key}"
        elif isinstance(value, int) and value < 1:
            said = f"{key}={value} must be at least 1"
        elif isinstance(value, int) and value > largest:
            said = f"{key} is larger than that of any model, {largest:,}"
        else:
            continue
        raise ConfigError(f"{file}: {said}; copy or download the file again")


def _check_attention(file: Path, config: dict[str, Any]) -> None:
    kinds = config.get("layer_types")
    if config.get("use_sliding_window"):
        raise ConfigError(f"{file}: use_sliding_window=true is not supported, qwlit computes full attention only")
    if kinds is None:
        return
    other = [kind for kind in kinds if kind != FULL_ATTENTION] if isinstance(kinds, list) else [kinds]
    if other:
        raise ConfigError(f"{file}: layer_types names {other[0]}, but qwlit computes {FULL_ATTENTION} only")


def _check_weights(file: Path, config: dict[str, Any]) -> None:
    if config.get("quantization_config"):
        raise ConfigError(f"{file}: the weights are quantized (quantization_config); give the unquantized model")


def _check_dtype(file: Path, config: dict[str, Any]) -> None:
    for key in DTYPE_KEYS:
        name = config.get(key)
        if name not in (None, "auto", *DTYPES, *(f"torch.{dtype}" for dtype in DTYPES)):
            raise ConfigError(f"{file}: {key}={name!r} must be one of auto, {', '.join(DTYPES)}")


def _check_rope(file: Path, config: dict[str, Any]) -> None:
    """Refuse a type of rotary embedding that transformers does not have."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if not isinstance(rope, dict):
            continue
        name = rope.get("rope_type") or rope.get("type") or "default"
        known = sorted({"default", *ROPE_INIT_FUNCTIONS})
        if name not in known:
            raise ConfigError(
                f"{file}: {key} has the type {name!r}, which transformers does not know; known: {', '.join(known)}"
            )


def _check_pad_token(file: Path, config: dict[str, Any]) -> None:
    pad, size = config.get("pad_token_id"), config.get("vocab_size")
    if isinstance(pad, int) and isinstance(size, int) and not 0 <= pad < size:
        raise ConfigError(f"{file}: pad_token_id={pad} has no row in an embedding of vocab_size={size}; set it null")


def declared_dtype(config: dict[str, Any]) -> str | None:
    """Return the name of the dtype in a checked config.json; None if it names none, or "auto"."""
    name = next((config[key] for key in DTYPE_KEYS if config.get(key) not in (None, "auto")), None)
    return None if name is None else str(name).removeprefix("torch.")


def has_tokenizer(folder: Path) -> bool:
    return any(all((folder / name).is_file() for name in names) for names in TOKENIZER_FILES)


def tokenizer_parts(folder: Path) -> list[Path]:
    """Return the files of the tokenizer in a folder, with its chat templates."""
    files = [*(folder / name for name in TOKENIZER_PARTS), *sorted((folder / OTHER_TEMPLATES).glob("*.jinja"))]
    return [file for file in files if file.is_file()]


def check_tokenizer_files(folder: Path, field: str) -> None:
    """Refuse a folder without a tokenizer.

    Raises:
        ConfigError: there is no such folder, it has no tokenizer files, or one of them is empty.
    """
    check_folder(folder, field)
    if not has_tokenizer(folder):
        raise ConfigError(
            f"{field}={folder} has no tokenizer (tokenizer.json, or vocab.json and merges.txt); "
            "copy it there or set model.tokenizer"
        )
    if empty := next((file for file in tokenizer_parts(folder) if not file.stat().st_size), None):
        # Also a link to a file in /proc: it has no size, but the environment variables as its content.
        raise ConfigError(f"{empty} is empty; copy it again, or delete it")
