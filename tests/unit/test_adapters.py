"""Adapters: what is trained, in which precision, and which targets are refused."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from qwlit.core.errors import ConfigError
from qwlit.model.adapters import apply_adapter
from qwlit.model.config import DECODER_LINEARS, AdapterConfig
from tests.tiny import tiny_causal_lm

LORA = AdapterConfig(kind="lora", rank=4, alpha=8)


def test_every_linear_of_a_decoder_layer_gets_an_adapter_and_only_adapters_train() -> None:
    model = tiny_causal_lm()
    apply_adapter(model, LORA, dropout=0.0, seed=0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(DECODER_LINEARS) * 2
    assert all("lora_A" in name or "lora_B" in name for name in trained)
    assert "model.layers.0.self_attn.q_proj.lora_A.default.weight" in trained


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_all_targets_the_layers_that_all_linear_of_peft_targets(family: str) -> None:
    ours, theirs = tiny_causal_lm(family), tiny_causal_lm(family)
    apply_adapter(ours, AdapterConfig(kind="lora", target_modules="all"), dropout=0.0, seed=0)  # type: ignore[arg-type]
    inject_adapter_in_model(LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"), theirs)
    adapted = [{name for name, module in m.named_modules() if hasattr(module, "lora_A")} for m in (ours, theirs)]
    assert adapted[0] == adapted[1] and len(adapted[0]) == 14


def test_adapters_are_float32_beside_a_bf16_model() -> None:
    model = tiny_causal_lm().to(torch.bfloat16)
    apply_adapter(model, LORA, dropout=0.0, seed=0)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_the_seed_alone_decides_the_start_and_the_generator_is_left_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    models = [tiny_causal_lm() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        apply_adapter(model, LORA, dropout=0.0, seed=seed)
    assert torch.equal(torch.get_rng_state(), before)
    one, two, other = (model.model.layers[0].mlp.up_proj.lora_A.default.weight for model in models)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_kind_none_changes_nothing() -> None:
    model = tiny_causal_lm()
    names = [name for name, _ in model.named_parameters()]
    apply_adapter(model, AdapterConfig(), dropout=0.0, seed=0)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == names


def test_lora_dropout_acts_in_training_only() -> None:
    model = tiny_causal_lm()
    apply_adapter(model, LORA, dropout=0.5, seed=0)
    layer = model.model.layers[0].mlp.up_proj
    torch.nn.init.normal_(layer.lora_B.default.weight)
    x = torch.randn(5, 32)
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_prj",), r"'q_prj' matches no linear layer. Did you mean 'q_proj'\?"),
        (("q_proj", "xyz"), "'xyz' matches no linear layer. Known: attention, down_proj, gate_proj"),
        (("embed",), r"'embed' matches no linear layer. Known: attention, .*, v_proj\.$"),
        (("lm_head",), "'lm_head' cannot have an adapter"),
        (("q_proj", "embed_tokens"), "'embed_tokens' cannot have an adapter"),
        (("model.embed_tokens",), "cannot have an adapter"),
        ((), "target_modules is empty"),
    ],
)
def test_targets_that_would_be_ignored_are_refused(targets: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_adapter(tiny_causal_lm(), AdapterConfig(kind="lora", target_modules=targets), dropout=0.0, seed=0)
