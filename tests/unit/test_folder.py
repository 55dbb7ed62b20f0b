"""What a model folder must have, and what each fault is called."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from qwlit.core.errors import ConfigError
from qwlit.model.config import FreezeConfig, ModelConfig
from qwlit.model.load import model_shape
from qwlit.model.presets import context_length
from tests.published import CASES
from tests.tiny import load_causal_lm, save_folder, tiny_causal_lm


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_folder(tiny_causal_lm(tied=False), tmp_path / "qwen-tiny")


def load(path: Path) -> PreTrainedModel:
    return load_causal_lm(ModelConfig(path=str(path)), seed=0, freeze=FreezeConfig(), frozen_dtype=torch.float32)


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def remove_key(folder: Path, key: str) -> None:
    file = folder / "config.json"
    values = json.loads(file.read_text())
    del values[key]
    file.write_text(json.dumps(values))


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
    "sliding layer": (
        lambda f: change_config(f, layer_types=["full_attention", "sliding_attention"]),
        "layer_types names sliding_attention",
    ),
    "unknown rope": (
        lambda f: change_config(f, rope_parameters=None, rope_scaling={"type": "su", "factor": 4.0}),
        "rope_scaling has the type 'su'",
    ),
    "rope without its factor": (
        lambda f: change_config(f, rope_parameters=None, rope_scaling={"type": "yarn"}),
        "factor",
    ),
    "unknown dtype": (
        lambda f: change_config(f, dtype=None, torch_dtype="bfloat"),
        "torch_dtype='bfloat' must be one of",
    ),
    "pad beyond the embedding": (lambda f: change_config(f, pad_token_id=97), "pad_token_id=97 has no row"),
    "unknown activation": (lambda f: change_config(f, hidden_act="silly"), "no model can be built.*silly"),
    "heads that do not group": (lambda f: change_config(f, num_key_value_heads=3), "num_key_value_heads=3 must divide"),
    "half a generation config": (
        lambda f: (f / "generation_config.json").write_text('{"temperature": 0.'),
        "generation_config.json cannot be read as JSON",
    ),
    "generation config of wrong types": (
        lambda f: (f / "generation_config.json").write_text('{"temperature": [1], "max_new_tokens": -3}'),
        "generation_config.json: .*max_new_tokens",
    ),
    "an adapter": (
        lambda f: (f / "model.safetensors").unlink() or (f / "config.json").rename(f / "adapter_config.json"),
        "is a peft adapter; give its base model as model.path and this folder as model.adapter_path",
    ),
    "a run": (
        lambda f: (f / "export").mkdir() or (f / "config.json").rename(f / "config.yaml"),
        "is a run of qwlit; to start from the model that it trained, set model.path=.*qwen-tiny/export",
    ),
    "a run that has not ended": (
        lambda f: (f / "config.json").rename(f / "config.yaml"),
        "is a run of qwlit that has not ended; train it to its end, which writes .*qwen-tiny/export",
    ),
    "no number of heads": (lambda f: remove_key(f, "num_key_value_heads"), "there is no num_key_value_heads"),
    "no heads": (lambda f: change_config(f, num_attention_heads=0), "num_attention_heads=0 must be at least 1"),
    "an end that is no id": (
        lambda f: (f / "generation_config.json").write_text('{"eos_token_id": ["<|im_end|>"]}'),
        "eos_token_id=.* must be a token's id",
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


def test_a_checkpoint_of_a_run_is_told_from_a_model(folder: Path) -> None:
    (folder / "config.json").rename(folder / "config.yaml")
    checkpoint = folder / "checkpoints" / "step-000100"
    checkpoint.mkdir(parents=True)
    (folder / "export").mkdir()
    for place in (checkpoint, checkpoint.parent):
        with pytest.raises(ConfigError, match=r"belongs to a run of qwlit; .* model.path=.*/qwen-tiny/export$"):
            load(place)
    (folder / "config.yaml").rename(folder / "moved")
    (checkpoint / "MANIFEST.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"is a checkpoint of qwlit without its run; give the run's export/ folder$"):
        load(checkpoint)


@pytest.mark.parametrize("case", ["config_no_head_dim", "config_rope_unknown", "config_sliding_layers"])
def test_configurations_that_users_brought_load_or_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    shutil.copy(CASES / f"{case}.json", tmp_path / "config.json")
    config = ModelConfig(path=str(tmp_path), init="random")
    if case == "config_no_head_dim":
        assert model_shape(config).head_dim == 8
        return
    with pytest.raises(ConfigError, match=r"config.json: .*('su'|sliding_attention)") as raised:
        model_shape(config)
    assert "\n" not in str(raised.value)


def test_a_tensor_in_two_shards_is_the_one_that_the_index_names(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    model = tiny_causal_lm(tied=False)
    model.save_pretrained(folder, max_shard_size="20KB")
    name = "model.norm.weight"
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    other = next(file for file in sorted(set(index.values())) if file != index[name])
    save_file(load_file(folder / other) | {name: torch.full((32,), 7.0)}, folder / other)
    loaded = load(folder)
    assert torch.equal(loaded.model.norm.weight, model.model.norm.weight)


def test_an_index_that_names_a_tensor_which_the_shard_lacks_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    tiny_causal_lm(tied=False).save_pretrained(folder, max_shard_size="20KB")
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.norm.weight"] = next(f for f in index["weight_map"].values() if "00001" in f)
    file.write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"lacks model\.norm\.weight, which the index says it holds"):
        load(folder)


def test_a_buffer_that_old_versions_of_transformers_saved_does_no_harm(folder: Path) -> None:
    change_weights(folder, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    load(folder)


@pytest.mark.parametrize("declared", ["auto", None])
def test_without_a_declared_dtype_that_of_the_weights_counts(declared: str | None, folder: Path) -> None:
    save_folder(tiny_causal_lm(tied=False).to(torch.bfloat16), folder)
    change_config(folder, dtype=None, torch_dtype=declared)
    assert load(folder).config.dtype == torch.bfloat16


def test_sampling_values_without_do_sample_are_no_obstacle(folder: Path) -> None:
    shutil.copy(CASES / "generation_config_temperature.json", folder / "generation_config.json")
    assert load(folder).generation_config.temperature == 0.7


def test_a_scaled_rotary_embedding_has_the_longer_context(folder: Path) -> None:
    change_config(folder, max_position_embeddings=128)
    assert context_length(load(folder).config) == 128
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    change_config(folder, rope_parameters=None, rope_scaling=scaling)
    assert context_length(load(folder).config) == 256
