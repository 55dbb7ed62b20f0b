"""What a model folder must have, and what each fault is called."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwlit.core.errors import ConfigError
from qwlit.model.config import FreezeConfig, ModelConfig
from qwlit.model.load import load_causal_lm
from tests.tiny import save_folder, tiny_causal_lm


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_folder(tiny_causal_lm(tied=False), tmp_path / "qwen-tiny")


def load(path: Path) -> None:
    load_causal_lm(ModelConfig(path=str(path)), seed=0, freeze=FreezeConfig(), frozen_dtype=torch.float32)


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "half a config": (lambda f: (f / "config.json").write_text('{"model_type": "qw'), "cannot be read as JSON"),
    "wrong type": (lambda f: change_config(f, hidden_size="wide"), "hidden_size"),
    "llama": (
        lambda f: change_config(f, model_type="llama", architectures=["LlamaForCausalLM"]),
        "is a LlamaForCausalLM",
    ),
    "moe": (
        lambda f: change_config(f, model_type="qwen2_moe", architectures=["Qwen2MoeForCausalLM"]),
        "is a Qwen2MoeForCausalLM",
    ),
    "vision": (
        lambda f: change_config(f, model_type="qwen2_vl", architectures=["Qwen2VLForConditionalGeneration"]),
        "is a Qwen2VLForConditionalGeneration",
    ),
    "no head": (lambda f: change_config(f, architectures=["Qwen3Model"]), "is a Qwen3Model"),
    "sliding": (lambda f: change_config(f, use_sliding_window=True), "use_sliding_window"),
    "quantized": (lambda f: change_config(f, quantization_config={"bits": 4}), "quantized"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    "pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "only pickled weights"),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), "cut off or damaged"),
    "cut off": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
        "cut off or damaged",
    ),
    "missing tensor": (
        lambda f: change_weights(f, lambda w: w.pop("model.norm.weight")),
        "missing: model.norm.weight",
    ),
    "unexpected tensor": (
        lambda f: change_weights(f, lambda w: w.update({"model.extra": torch.ones(1)})),
        "unexpected: model.extra",
    ),
    "other shape": (
        lambda f: change_weights(f, lambda w: w.update({"model.norm.weight": torch.ones(3)})),
        r"of another shape: model.norm.weight \[3\] instead of \[32\]",
    ),
    "other depth": (lambda f: change_config(f, num_hidden_layers=1, layer_types=None), "unexpected: model.layers.1."),
    "nan": (
        lambda f: change_weights(f, lambda w: w["model.norm.weight"].fill_(float("nan"))),
        "model.norm.weight holds inf or NaN",
    ),
    "head of its own": (lambda f: change_config(f, tie_word_embeddings=True), "tie_word_embeddings=true"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_a_folder_is_named_in_one_line(fault: str, folder: Path) -> None:
    spoil, message = FAULTS[fault]
    spoil(folder)
    with pytest.raises(ConfigError, match=message) as raised:
        load(folder)
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    tiny_causal_lm(tied=False).save_pretrained(folder, max_shard_size="20KB")
    first = sorted(folder.glob("model-*.safetensors"))[0]
    first.unlink()
    with pytest.raises(ConfigError, match=f"index.json names missing files: {first.name}"):
        load(folder)


def test_a_missing_folder_comes_with_the_nearest_name(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such folder. Did you mean 'qwen-tiny'\?"):
        load(folder.with_name("qwen-tny"))
