"""Starting from an adapter that peft saved: merged it equals peft's own merge, continued it equals peft's model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from qwlit.config.compose import compose
from qwlit.core.errors import ConfigError
from qwlit.model.config import AdapterConfig, DropoutConfig, Execution, FreezeConfig, ModelConfig
from qwlit.model.loss_model import build_loss_model, build_meta_model
from tests.tiny import save_folder, tiny_causal_lm

EXECUTION = Execution("sdpa", "none", torch.float32, torch.float32)
IDS = torch.arange(3, 40)[None]
FORMS: dict[str, dict[str, Any]] = {
    "attention alone": {"target_modules": ["q_proj", "v_proj"]},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "a regular expression": {"target_modules": r".*layers\.1\..*_proj"},
    "ranks and alphas by pattern": {
        "target_modules": ["q_proj", "o_proj", "up_proj"],
        "rank_pattern": {"o_proj": 2, r"layers\.1\.mlp\.up_proj": 3},
        "alpha_pattern": {"up_proj": 5, r"model\.layers\.0\.self_attn\.q_proj": 32},
    },
    "a whole head beside it": {"target_modules": ["k_proj"], "modules_to_save": ["lm_head"]},
    "biases": {"target_modules": ["q_proj", "k_proj"], "bias": "lora_only"},
}


def base(family: str = "qwen2", *, tied: bool = False) -> PreTrainedModel:
    return tiny_causal_lm(family, tied=tied, spread=1.0)


def saved_by_peft(folder: Path, *, family: str = "qwen2", tied: bool = False, **form: Any) -> tuple[Path, PeftModel]:
    """Save a base and an adapter whose every number differs from its start; return the adapter's folder."""
    model = get_peft_model(base(family, tied=tied), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, **form))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(folder / "adapter")
    save_folder(base(family, tied=tied), folder / "base")
    return folder / "adapter", model.eval()


def loaded(adapter: Path, config: AdapterConfig | None = None) -> PreTrainedModel:
    """Load as `train` does: checked against the shapes first, then for real."""
    model = ModelConfig(path=str(adapter.parent / "base"), adapter_path=str(adapter))
    options = (model, config or AdapterConfig(), DropoutConfig(), FreezeConfig())
    build_meta_model(*options)
    return build_loss_model(*options, EXECUTION, seed=0).causal_lm.eval()


def logits(model: Any) -> torch.Tensor:
    model.config._attn_implementation = "sdpa"
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("form", FORMS)
def test_merged_it_equals_pefts_own_merge(form: str, tmp_path: Path) -> None:
    adapter, by_peft = saved_by_peft(tmp_path, **FORMS[form])
    merged = by_peft.merge_and_unload()
    ours = loaded(adapter)
    assert all(parameter.requires_grad for parameter in ours.parameters())
    state = ours.state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(state[name], tensor, atol=1e-6, rtol=1e-5)
    assert any(not torch.equal(state[name], tensor) for name, tensor in base().state_dict().items())


@pytest.mark.parametrize(
    ("form", "config"),
    [
        ("attention alone", AdapterConfig(kind="lora", rank=4, alpha=16, target_modules=("q_proj", "v_proj"))),
        ("rslora", AdapterConfig(kind="lora", rank=4, alpha=16, use_rslora=True)),
        (
            "dora",
            AdapterConfig(kind="lora", rank=4, alpha=16, target_modules=("q_proj", "down_proj"), use_dora=True),
        ),
    ],
)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_continued_it_starts_where_pefts_model_stands(
    form: str, config: AdapterConfig, family: str, tmp_path: Path
) -> None:
    adapter, by_peft = saved_by_peft(tmp_path, family=family, **FORMS[form])
    ours = loaded(adapter, config)
    assert {name for name, p in ours.named_parameters() if p.requires_grad} == {
        name for name, _ in ours.named_parameters() if "lora_" in name
    }
    torch.testing.assert_close(logits(ours), logits(by_peft), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(logits(ours), logits(base(family)), atol=1e-3)


def test_other_settings_are_refused_with_the_ones_to_type(tmp_path: Path) -> None:
    adapter, _ = saved_by_peft(tmp_path, target_modules=["q_proj", "v_proj"])
    with pytest.raises(
        ConfigError,
        match=r"set adapter.rank=4 adapter.alpha=16 adapter.target_modules=\[q_proj,v_proj\]; recipe=full_sft merges",
    ):
        loaded(adapter, AdapterConfig(kind="lora"))
    with_patterns, _ = saved_by_peft(tmp_path / "b", **FORMS["ranks and alphas by pattern"])
    with pytest.raises(ConfigError, match="rank_pattern, alpha_pattern, which adapter"):
        loaded(with_patterns, AdapterConfig(kind="lora", rank=4, alpha=16))


def change(adapter: Path, **values: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def drop_a_tensor(adapter: Path) -> None:
    state = load_file(adapter / "adapter_model.safetensors")
    state.pop(next(name for name in state if "lora_B" in name))
    save_file(state, adapter / "adapter_model.safetensors")


ONE_END_OF_TWO: list[dict[str, Any]] = [
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    {"target_modules": ["q_proj", "lm_head"]},
]


@pytest.mark.parametrize("form", ONE_END_OF_TWO)
def test_an_adapter_that_parts_head_and_embedding_is_refused_where_they_are_one(
    form: dict[str, Any], tmp_path: Path
) -> None:
    adapter, _ = saved_by_peft(tmp_path, tied=True, **form)
    with pytest.raises(ConfigError, match=r"but the model's head is its embedding .* merge it with peft"):
        loaded(adapter)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_whose_start_changes_the_base_is_refused(start: str, tmp_path: Path) -> None:
    adapter, _ = saved_by_peft(tmp_path, target_modules=["q_proj"], init_lora_weights=start)
    for config in (AdapterConfig(), AdapterConfig(kind="lora", rank=4, alpha=16, target_modules=("q_proj",))):
        with pytest.raises(ConfigError, match=f"init_lora_weights={start} is a form of LoRA .* merge it with peft"):
            loaded(adapter, config)


@pytest.mark.parametrize("start", ["gaussian", "orthogonal"])
def test_other_starts_are_read(start: str, tmp_path: Path) -> None:
    adapter, by_peft = saved_by_peft(tmp_path, target_modules=["q_proj"], init_lora_weights=start)
    torch.testing.assert_close(logits(loaded(adapter)), logits(by_peft), atol=1e-5, rtol=1e-4)


FAULTS: dict[str, tuple[Any, str]] = {
    "patterns that are none": (lambda f: change(f, alpha_pattern=[1]), "alpha_pattern must map patterns"),
    "a pattern that cannot be read": (lambda f: change(f, alpha_pattern={"(": 3}), "is no regular expression"),
    "a form of tomorrow": (lambda f: change(f, use_newlora=True), "use_newlora=True is a form of LoRA"),
    "half a configuration": (lambda f: (f / "adapter_config.json").write_text('{"r": 4'), "cannot be read as JSON"),
    "no configuration": (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "pickled": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        "pickled weights can run code",
    ),
    "cut off": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:-9]),
        "cut off or damaged",
    ),
    "no alpha": (lambda f: change(f, lora_alpha=None), "lora_alpha is missing"),
    "another form": (lambda f: change(f, layer_replication=[[0, 2]]), "layer_replication=.* merge it with peft"),
    "half a pair": (drop_a_tensor, "of another shape"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_an_adapters_folder_is_named_in_one_line(fault: str, tmp_path: Path) -> None:
    adapter, _ = saved_by_peft(tmp_path, target_modules=["q_proj"])
    spoil, message = FAULTS[fault]
    spoil(adapter)
    with pytest.raises(ConfigError, match=message) as raised:
        loaded(adapter)
    assert "\n" not in str(raised.value) and str(adapter) in str(raised.value)


def test_an_adapter_of_another_kind_or_another_model_is_refused(tmp_path: Path) -> None:
    kind = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    get_peft_model(base(), kind).save_pretrained(tmp_path / "ia3")
    save_folder(base(), tmp_path / "base")
    with pytest.raises(ConfigError, match="is a IA3 adapter, qwlit reads LoRA"):
        loaded(tmp_path / "ia3")
    adapter, _ = saved_by_peft(tmp_path, target_modules=["q_proj"])
    save_folder(tiny_causal_lm("qwen2", hidden_size=64), tmp_path / "base")
    with pytest.raises(
        ConfigError, match=r"does not fit the model. Tensors of another shape: .*q_proj.weight \[32, 32\]"
    ):
        loaded(adapter)


def test_an_adapters_folder_as_the_model_means_its_base_and_itself(tmp_path: Path) -> None:
    adapter, _ = saved_by_peft(tmp_path, target_modules=["q_proj"])
    change(adapter, base_model_name_or_path=str(tmp_path / "base"))
    config = compose([f"model.path={adapter}", "data.path=x.jsonl"]).config
    assert (config.model.path, config.model.adapter_path) == (str(tmp_path / "base"), str(adapter))
    assert str(config.run.name).startswith("adapter-full_sft")
    change(adapter, base_model_name_or_path="Qwen/Qwen2.5-0.5B")
    model = compose([f"model.path={adapter}", "data.path=x.jsonl"]).config.model
    assert (model.path, model.hub_id, model.architecture) == (None, "Qwen/Qwen2.5-0.5B", None)
    for gone in (None, "/gone/base"):
        change(adapter, base_model_name_or_path=gone)
        with pytest.raises(ConfigError, match=r"set model.path=BASE model.adapter_path=.*/adapter"):
            compose([f"model.path={adapter}", "data.path=x.jsonl"])
    with pytest.raises(ConfigError, match=r"but model\.init=random"):
        compose([f"model.adapter_path={adapter}", "model.init=random", "data.path=x.jsonl"])
