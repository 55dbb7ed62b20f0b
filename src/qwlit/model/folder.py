"""A local Hugging Face folder: what must be in it, read with one clear line for whatever is wrong."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwlit.core.errors import ConfigError, nearest

SUPPORTED = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))


def check_folder(folder: Path, field: str) -> None:
    """Refuse a setting that names no folder, with the nearest name beside it.

    Raises:
        ConfigError: `folder` does not exist or is a file.
    """
    if folder.is_dir():
        return
    if folder.exists():
        raise ConfigError(f"{field}={folder} is a file; give the Hugging Face folder it lies in")
    parent = folder.absolute().parent
    siblings = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
    raise ConfigError(f"{field}={folder}: no such folder.{nearest(folder.name, siblings)}")


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ConfigError: the file is cut off or no JSON object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as JSON ({error}); copy or download it again") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{file} is no JSON object; copy or download it again")
    return value


def read_model_config(folder: Path, field: str = "model.path") -> dict[str, Any]:
    """Read and check config.json.

    Raises:
        ConfigError: no folder, no config.json, another architecture, a sliding window, or quantized weights.
    """
    check_folder(folder, field)
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(f"{field}={folder} has no config.json; give a Hugging Face model folder")
    config = read_json(file)
    model_type = str(config.get("model_type"))
    names = config.get("architectures") or [SUPPORTED.get(model_type, model_type)]
    if names != [SUPPORTED.get(model_type)]:
        found = f"{', '.join(map(str, names))} (model_type {model_type})"
        raise ConfigError(f"{field}={folder} is a {found}; qwlit trains {' and '.join(SUPPORTED.values())}")
    if config.get("use_sliding_window"):
        raise ConfigError(f"{file}: use_sliding_window=true is not supported, attention here is always full")
    if config.get("quantization_config"):
        raise ConfigError(f"{file}: the weights are quantized (quantization_config); give the unquantized model")
    return config


def check_tokenizer_files(folder: Path, field: str) -> None:
    """Refuse a folder without a tokenizer.

    Raises:
        ConfigError: there is no folder or it lacks the tokenizer's files.
    """
    check_folder(folder, field)
    if not any(all((folder / name).is_file() for name in names) for names in TOKENIZER_FILES):
        raise ConfigError(
            f"{field}={folder} has no tokenizer (tokenizer.json, or vocab.json and merges.txt); "
            "copy it there or set model.tokenizer"
        )


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that make up the model.

    Raises:
        ConfigError: there are none, or the index names one that is missing.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        pickled = sorted(entry.name for entry in folder.glob("*.bin"))
        if pickled:
            raise ConfigError(
                f"{folder} has only pickled weights ({pickled[0]}), which can run code when read; convert them: "
                "save_pretrained in transformers writes safetensors"
            )
        raise ConfigError(f"{folder} has no weights ({WEIGHTS}); copy them there, or set model.init=random")
    weight_map = read_json(folder / INDEX).get("weight_map")
    names = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise ConfigError(f"{folder / INDEX} names missing files: {first_few(missing) or 'none at all'}; copy them too")
    return [folder / name for name in names]


def read_shapes(files: list[Path]) -> Iterator[tuple[str, list[int]]]:
    """Yield names and shapes from the files' headers; see `read_tensors`."""
    for name, tensor in read_tensors(files):
        yield name, list(tensor.get_shape())


def read_tensors(files: list[Path]) -> Iterator[tuple[str, Any]]:
    """Yield names and what gives the tensor's rows when sliced; nothing is read before.

    Raises:
        ConfigError: a file is cut off or damaged.
    """
    from safetensors import SafetensorError, safe_open

    for file in files:
        try:
            with safe_open(str(file), framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dictionary
                    yield name, opened.get_slice(name)
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{file} is cut off or damaged ({error}); copy or download it again") from None


# Of each file: enough to tell other weights, little enough for a model of any size.
SAMPLED_BLOCKS, BLOCK_BYTES = 64, 4096


def fingerprint_weights(folder: Path) -> str:
    """Return a hash of names, sizes, headers and evenly spaced blocks of the weights' files."""
    digest = hashlib.sha256()
    for file in weight_files(folder):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as handle:
            for number in range(SAMPLED_BLOCKS + 1):
                handle.seek(max(0, size - BLOCK_BYTES) * number // SAMPLED_BLOCKS)
                digest.update(handle.read(BLOCK_BYTES))
    return digest.hexdigest()[:16]


def first_few(names: list[str], limit: int = 3) -> str:
    """Name the first few of many."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
