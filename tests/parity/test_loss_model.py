"""LossModel against plain transformers: each document alone, full logits, F.cross_entropy."""

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qwlit.model.adapters import apply_adapter
from qwlit.model.attention import generation_attention, register_attention
from qwlit.model.config import AdapterConfig, DropoutConfig, Execution, FreezeConfig, ModelConfig
from qwlit.model.loss_model import LossModel, build_loss_model
from tests.tiny import TINY, Sample, packed, padded, random_samples, tiny_causal_lm

LENGTHS = [7, 19, 3, 19, 2, 30]
MODELS = [(family, tied) for family in ("qwen2", "qwen3") for tied in (True, False)]


def reference(model: Any, samples: list[Sample]) -> torch.Tensor:
    """Sum the losses of the supervised tokens, one plain forward per document."""
    total = torch.zeros((), dtype=model.dtype)
    for ids, mask in samples:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
        targets = torch.tensor([token if kept else -100 for token, kept in zip(ids, mask, strict=True)][1:])
        total = total + F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    return total


def loss_model(plain: nn.Module, attention: Any = "sdpa") -> LossModel:
    """Wrap a copy of `plain` with qwlit's attention."""
    model: Any = deepcopy(plain)
    model.set_attn_implementation(register_attention())
    return LossModel(model, attention).train()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check(ours: LossModel, plain: Any, samples: list[Sample], layout: Any, limit: float) -> None:
    """Compare loss and each gradient: norm of the difference over norm."""
    expected_loss = reference(plain, samples)
    expected_loss.backward()
    out = ours(layout(samples))
    out.loss_sum.backward()
    assert abs(out.loss_sum.item() / expected_loss.item() - 1) < limit
    found, expected = gradients(ours.causal_lm), gradients(plain)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        # A key's bias shifts all scores of a query alike, which softmax does not see: its gradient is zero but for
        # rounding, and is measured against the query's.
        scale = expected[name.replace("k_proj", "q_proj")] if name.endswith("k_proj.bias") else gradient
        difference = ((found[name] - gradient).norm() / scale.norm()).item()
        assert difference < limit, f"{name}: {difference:.1e}"


# In float64 nothing but a mistake could differ; in float32, summing in another order does.
PRECISIONS = [(torch.float64, 1e-13), (torch.float32, 1e-6)]


@pytest.mark.parametrize("layout", [packed, padded])
@pytest.mark.parametrize(("dtype", "limit"), PRECISIONS)
@pytest.mark.parametrize(("family", "tied"), MODELS)
def test_loss_and_all_gradients_equal_plain_transformers(
    family: str, tied: bool, dtype: torch.dtype, limit: float, layout: Any
) -> None:
    plain, samples = tiny_causal_lm(family, tied=tied).to(dtype), random_samples(LENGTHS)
    plain.set_attn_implementation("sdpa")
    check(loss_model(plain), plain, samples, layout, limit)


@pytest.mark.parametrize("layout", [packed, padded])
@pytest.mark.parametrize(("family", "tied"), MODELS)
def test_eager_equals_transformers_eager(family: str, tied: bool, layout: Any) -> None:
    plain, samples = tiny_causal_lm(family, tied=tied), random_samples(LENGTHS)
    check(loss_model(plain, "eager"), plain, samples, layout, 1e-6)


@pytest.mark.parametrize("layout", [packed, padded])
@pytest.mark.parametrize(("dtype", "limit"), PRECISIONS)
def test_eager_equals_sdpa_within_every_packed_document(dtype: torch.dtype, limit: float, layout: Any) -> None:
    plain, micro = tiny_causal_lm("qwen3").to(dtype), layout(random_samples(LENGTHS))
    models = [loss_model(plain, kernel) for kernel in ("sdpa", "eager")]
    losses = [model(micro).loss_sum for model in models]
    assert abs(losses[1].item() / losses[0].item() - 1) < limit
    for loss in losses:
        loss.backward()
    for name, gradient in gradients(models[0]).items():
        assert (gradients(models[1])[name] - gradient).norm() < limit * gradient.norm(), name


@pytest.mark.parametrize("layout", [packed, padded])
def test_off_cuda_varlen_falls_back_to_the_same_numbers_as_sdpa(layout: Any) -> None:
    plain, micro = tiny_causal_lm("qwen3"), layout(random_samples(LENGTHS))
    one, two = (loss_model(plain, kernel)(micro).loss_sum for kernel in ("varlen", "sdpa"))
    assert torch.equal(one, two)


@pytest.mark.parametrize(("dtype", "limit"), PRECISIONS)
@pytest.mark.parametrize(("family", "tied"), MODELS)
def test_with_lora_loss_and_gradients_equal_plain_transformers_with_pefts_layers(
    family: str, tied: bool, dtype: torch.dtype, limit: float
) -> None:
    base, samples = tiny_causal_lm(family, tied=tied).to(dtype), random_samples(LENGTHS)
    base.set_attn_implementation("sdpa")
    plain = deepcopy(base)
    apply_adapter(plain, AdapterConfig(kind="lora", rank=4, alpha=8), dropout=0.0, seed=0)
    plain.to(dtype)
    torch.manual_seed(0)
    with torch.no_grad():
        assert torch.equal(reference(plain, samples), reference(base, samples))
        for name, parameter in plain.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    check(loss_model(plain), plain, samples, packed, limit)
    assert all("lora_" in name for name in gradients(plain))


@pytest.mark.parametrize("layout", [packed, padded])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_samples_never_see_each_other(attention: Any, layout: Any) -> None:
    model = loss_model(tiny_causal_lm("qwen3"), attention)
    first, second = random_samples([11, 8])
    other = random_samples([8], seed=5)[0]

    def gradient(*samples: Sample) -> list[torch.Tensor]:
        """Gradient of the first sample's loss alone."""
        model.zero_grad()
        silent = [(ids, [0] * len(ids)) for ids, _ in samples[1:]]
        model(layout([samples[0], *silent])).loss_sum.backward()
        return [tensor.clone() for tensor in gradients(model).values()]

    pairs = zip(gradient(first, second), gradient(first, other), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    pairs = zip(gradient(first, second), gradient(first), strict=True)
    assert all((a - b).norm() <= 1e-6 * b.norm() for a, b in pairs)


def test_no_supervised_rows_give_zero_gradients_for_every_parameter() -> None:
    model = loss_model(tiny_causal_lm("qwen2"))
    ids = list(range(6))
    out = model(packed([(ids, [0] * 6)]))
    out.loss_sum.backward()
    assert out.loss_sum.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_correct_tokens_are_counted_in_eval_mode_only() -> None:
    plain, samples = tiny_causal_lm("qwen3"), random_samples(LENGTHS)
    model, micro = loss_model(plain), packed(samples)
    with torch.no_grad():
        logits = torch.cat([plain(torch.tensor([ids])).logits[0] for ids, _ in samples])
        micro.targets[::2] = logits.argmax(dim=-1)[micro.label_positions][::2]
        expected = (logits.argmax(dim=-1)[micro.label_positions] == micro.targets).sum()
        assert model.eval()(micro).num_correct == expected >= len(micro.label_positions) // 2
    assert model.train()(micro).num_correct == 0


def test_under_bf16_autocast_packed_equals_padded() -> None:
    plain, samples = tiny_causal_lm("qwen3"), random_samples(LENGTHS)
    model = loss_model(plain)
    with torch.autocast("cpu", torch.bfloat16):
        one, two = (model(layout(samples)).loss_sum for layout in (packed, padded))
    assert abs(one / two - 1) < 1e-3
    assert abs(one / reference(plain, samples) - 1) < 1e-2


def test_a_plain_forward_outside_generation_attention_is_refused() -> None:
    causal_lm: Any = loss_model(tiny_causal_lm("qwen3")).causal_lm
    ids = torch.arange(5)[None]
    with pytest.raises(RuntimeError, match="generation_attention"):
        causal_lm(input_ids=ids)
    with generation_attention(causal_lm):
        causal_lm(input_ids=ids)


def test_it_builds_from_configuration_with_adapter_and_dropout() -> None:
    model = build_loss_model(
        ModelConfig(init="random", architecture=TINY),
        AdapterConfig(kind="lora", rank=2),
        DropoutConfig(attention=0.1),
        FreezeConfig(),
        Execution("sdpa", "none", torch.bfloat16, torch.bfloat16),
        seed=0,
    )
    assert model.training
    assert {str(p.dtype) for p in model.parameters() if not p.requires_grad} == {"torch.bfloat16"}
    assert {str(p.dtype) for p in model.parameters() if p.requires_grad} == {"torch.float32"}
    model(packed(random_samples([5, 9]))).loss_sum.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
