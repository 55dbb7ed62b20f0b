"""Loading: what comes back from a folder, from random init, and for a tokenizer."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from qwlit.core.errors import ConfigError
from qwlit.model.attention import ATTENTION_NAME, generation_attention
from qwlit.model.config import FreezeConfig, ModelConfig
from qwlit.model.families import FAMILIES
from qwlit.model.load import (
    check_vocabulary,
    load_tokenizer,
    vocabulary_size,
)
from qwlit.model.presets import to_hf_config
from qwlit.model.weight_files import read_shapes, stored_dtype, weight_files
from tests.tiny import TINY, load_causal_lm, save_folder, tiny_architecture, tiny_causal_lm

DEMO_TOKENIZER = "qwlit:demo/tokenizer"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_folder(tiny_causal_lm(tied=False), tmp_path / "qwen-tiny")


def load(path: Path, **kwargs: Any) -> PreTrainedModel:
    options: dict[str, Any] = {"seed": 0, "freeze": FreezeConfig(), "frozen_dtype": torch.float32}
    return load_causal_lm(ModelConfig(path=str(path)), **(options | kwargs))


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_comes_back_weight_for_weight_and_computes_the_same(
    family: str, tied: bool, tmp_path: Path
) -> None:
    saved = tiny_causal_lm(family, tied=tied)
    loaded = load(save_folder(saved, tmp_path / "m"))
    assert loaded.config._attn_implementation == ATTENTION_NAME
    assert loaded.config.use_cache is False
    assert loaded.training
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    ids = torch.arange(12)[None]
    with generation_attention(loaded), torch.no_grad():
        assert torch.allclose(loaded(ids).logits, saved(ids).logits, atol=1e-4)
    assert loaded.config._attn_implementation == ATTENTION_NAME
    assert {k: v.tolist() for k, v in loaded.state_dict().items()} == {
        k: v.tolist() for k, v in saved.state_dict().items()
    }


def test_generation_with_left_padding_equals_single_prompts(folder: Path) -> None:
    model = load(folder).eval()
    prompts = [[5, 6, 7, 8, 9], [11, 12]]
    with generation_attention(model), torch.no_grad():
        options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        single = [model.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in prompts]
        ids = torch.tensor([prompts[0], [0, 0, 0, *prompts[1]]])
        mask = torch.tensor([[1] * 5, [0] * 3 + [1] * 2])
        batch = model.generate(ids, attention_mask=mask, **options)[:, 5:].tolist()
    assert batch == single


def test_generation_uses_the_cache_that_training_does_without(folder: Path) -> None:
    change_config(folder, use_cache=False)
    model = load(folder).eval()
    widths: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, __, given: widths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    with generation_attention(model), torch.no_grad():
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert widths == [3, 1, 1]


def test_weights_are_float32_to_train_and_of_the_frozen_dtype_otherwise(folder: Path) -> None:
    save_folder(tiny_causal_lm(tied=False).to(torch.bfloat16), folder)
    trained = load(folder)
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in trained.parameters())
    frozen = load(folder, freeze=None, frozen_dtype=torch.bfloat16)
    assert {p.dtype for p in frozen.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in frozen.parameters())
    assert {b.dtype for b in frozen.buffers()} == {torch.float32}
    assert torch.equal(frozen.model.rotary_emb.inv_freq, tiny_causal_lm().model.rotary_emb.inv_freq)


def test_training_in_place_leaves_the_file_alone(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    model = load(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (folder / "model.safetensors").read_bytes() == before


def test_sharded_weights_load(folder: Path) -> None:
    whole = load(folder).state_dict()
    (folder / "model.safetensors").unlink()
    tiny_causal_lm(tied=False).save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").is_file()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in load(folder).state_dict().items())


def test_shapes_and_the_stored_dtype_take_one_opening_of_each_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def counting(file: str, **options: Any) -> Any:
        opened.append(Path(file).name)
        return safe_open(file, **options)

    monkeypatch.setattr(safetensors, "safe_open", counting)
    files = weight_files(folder)
    assert len(read_shapes(files)) > 2
    assert stored_dtype(folder) == torch.float32
    assert opened == [file.name for file in files] * 2


def test_random_init_depends_on_the_seed_alone_and_leaves_the_generator_alone() -> None:
    config = ModelConfig(init="random", architecture=TINY)
    options: dict[str, Any] = {"freeze": FreezeConfig(), "frozen_dtype": torch.float32}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, two, other = (load_causal_lm(config, seed=seed, **options) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.lm_head.weight, two.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize(("family", "tied"), [("qwen3", True), ("qwen2", False)])
def test_random_weights_are_distributed_as_the_familys_own(family: str, tied: bool) -> None:
    architecture = replace(tiny_architecture(family, tied=tied), hidden_size=128, initializer_range=0.03)
    config = ModelConfig(init="random", architecture=architecture)
    ours = dict(load_causal_lm(config, seed=0, freeze=FreezeConfig(), frozen_dtype=torch.float32).named_parameters())
    _, model_class = FAMILIES[family].classes()
    theirs = dict(model_class(to_hf_config(architecture)).named_parameters())
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert float(ours[name].std()) == pytest.approx(float(weight.std()), rel=0.05), name
        assert float(ours[name].mean()) == pytest.approx(float(weight.mean()), abs=0.002), name
    drawn = [weight for weight in ours.values() if weight.ndim == 2]
    assert len({float(weight[0, 0]) for weight in drawn}) == len(drawn), "no two tensors share their numbers"


def test_random_init_with_a_path_takes_its_config_and_not_its_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    config = ModelConfig(init="random", path=str(folder))
    model = load_causal_lm(config, seed=0, freeze=FreezeConfig(), frozen_dtype=torch.float32)
    assert model.config.hidden_size == TINY.hidden_size
    assert not model.config.tie_word_embeddings


def test_the_published_form_of_config_json_is_understood(folder: Path) -> None:
    change_config(folder, rope_theta=1000000, rope_scaling=None, torch_dtype="bfloat16", sliding_window=None)
    values = json.loads((folder / "config.json").read_text())
    del values["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(values))
    model = load(folder)
    assert model.config.rope_parameters["rope_theta"] == 1e6
    assert model.lm_head.weight.dtype == torch.float32


def test_the_folders_own_generation_settings_are_kept(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert load(folder).generation_config.eos_token_id == [3, 4]


def test_a_tokenizer_is_the_models_own_unless_another_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match="has no tokenizer"):
        load_tokenizer(ModelConfig(path=str(folder)))
    demo = load_tokenizer(ModelConfig(path=str(folder), tokenizer=DEMO_TOKENIZER))
    demo.save_pretrained(folder)
    own = load_tokenizer(ModelConfig(path=str(folder)))
    assert own.get_vocab() == demo.get_vocab()
    assert own.encode("2 + 2 = 四") == demo.encode("2 + 2 = 四")


def test_a_damaged_tokenizer_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0", "mod')
    with pytest.raises(ConfigError, match="the tokenizer cannot be read"):
        load_tokenizer(ModelConfig(path=str(folder)))


def test_a_tokenizer_with_more_tokens_than_embedding_rows_is_refused() -> None:
    tokenizer = load_tokenizer(ModelConfig(tokenizer=DEMO_TOKENIZER))
    config = ModelConfig(init="random", architecture=TINY)
    assert vocabulary_size(config) == TINY.vocab_size < len(tokenizer)
    with pytest.raises(ConfigError, match="the embedding 97 rows"):
        check_vocabulary(config, tokenizer)
