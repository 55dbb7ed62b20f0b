"""Dropout and NEFTune: on in training, off in evaluation, reproducible, and absent at 0."""

import math
from typing import Any

import pytest
import torch
from transformers.integrations.neftune import neftune_post_forward_hook

from qwlit.core.errors import ConfigError
from qwlit.model.activation_checkpointing import apply_activation_checkpointing
from qwlit.model.attention import register_attention
from qwlit.model.config import ActivationCheckpointing, DropoutConfig
from qwlit.model.dropout import apply_dropout
from qwlit.model.loss_model import LossModel
from tests.tiny import packed, padded, random_samples, tiny_causal_lm

SAMPLES = random_samples([9, 14, 5])


def model_with(kernel: str = "sdpa", **dropout: Any) -> LossModel:
    causal_lm = tiny_causal_lm()
    causal_lm.set_attn_implementation(register_attention())
    apply_dropout(causal_lm, DropoutConfig(**dropout))
    return LossModel(causal_lm, kernel, neftune_alpha=dropout.get("neftune_alpha", 0.0))  # type: ignore[arg-type]


def loss(model: LossModel, seed: int, layout: object = packed) -> float:
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(layout(SAMPLES)).loss_sum.item()  # type: ignore[operator]


@pytest.mark.parametrize("layout", [packed, padded])
@pytest.mark.parametrize("kernel", ["sdpa", "eager", "varlen"])
@pytest.mark.parametrize("place", ["attention", "feed_forward", "residual", "embedding", "neftune_alpha"])
def test_each_dropout_acts_in_training_only_and_repeats_with_the_seed(place: str, kernel: str, layout: object) -> None:
    model = model_with(kernel, **{place: 0.2})
    plain = loss(model_with(kernel).eval(), 0, layout)
    model.train()
    assert loss(model, 1, layout) == loss(model, 1, layout)
    assert loss(model, 1, layout) != loss(model, 2, layout)
    model.eval()
    assert loss(model, 1, layout) == loss(model, 2, layout) == plain


def test_at_zero_nothing_is_drawn_and_no_hook_is_there() -> None:
    model = model_with().train()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model(packed(SAMPLES))
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module._forward_hooks for module in model.modules())


def dropped_share(out: torch.Tensor, kept: torch.Tensor) -> float:
    """Check that what is left is scaled up, and return the share that is not."""
    dropped = out == 0
    assert torch.allclose(out[~dropped], kept[~dropped] / 0.75, rtol=1e-4)
    return dropped.float().mean().item()


def test_the_right_share_is_dropped_where_each_setting_says_and_the_rest_scaled_up() -> None:
    x = torch.randn(1, 300, 32)
    plain = model_with().causal_lm.model
    mlp = plain.layers[0].mlp
    inner = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    seen: list[torch.Tensor] = []
    block = model_with(feed_forward=0.25).train().causal_lm.model.layers[0].mlp
    block.down_proj.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    block(x)
    assert abs(dropped_share(seen[0], inner) - 0.25) < 0.02
    block = model_with(residual=0.25).train().causal_lm.model.layers[0].mlp
    assert abs(dropped_share(block(x), mlp(x)) - 0.25) < 0.02
    ids = torch.randint(0, 97, (1, 300))
    embedding = model_with(embedding=0.25).train().causal_lm.model.embed_tokens
    assert abs(dropped_share(embedding(ids), plain.embed_tokens(ids)) - 0.25) < 0.02


def test_only_the_layers_in_the_range_drop() -> None:
    dropout = DropoutConfig(attention=0.1, feed_forward=0.1, residual=0.1, layers=(1, 1))
    layers = model_with(**vars(dropout)).causal_lm.model.layers
    assert [layer.self_attn.attention_dropout for layer in layers] == [0.0, 0.1]
    assert [len(layer.mlp._forward_hooks) + len(layer.self_attn._forward_hooks) for layer in layers] == [0, 2]
    assert [len(layer.mlp.down_proj._forward_pre_hooks) for layer in layers] == [0, 1]
    with pytest.raises(ConfigError, match=r"dropout.layers: layers \[1,2\] are not a range of the model"):
        model_with(attention=0.1, layers=(1, 2))


@pytest.mark.parametrize("policy", ["selective", "full"])
def test_dropout_under_checkpointing_is_dropout_without(policy: ActivationCheckpointing) -> None:
    gradients = []
    for memory in ("none", policy):
        model = model_with(attention=0.1, feed_forward=0.1, residual=0.1, embedding=0.1, neftune_alpha=5.0).train()
        apply_activation_checkpointing(model.causal_lm, memory)
        torch.manual_seed(5)
        model(packed(SAMPLES)).loss_sum.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def noise(layout: Any) -> torch.Tensor:
    """Return what NEFTune with alpha 5 adds to the embedded tokens (B, T, D), as the first decoder layer gets them."""
    model, micro = model_with(neftune_alpha=5.0).train(), layout(SAMPLES)
    seen: list[torch.Tensor] = []
    model.causal_lm.model.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    torch.manual_seed(3)
    model(micro)
    return seen[0] - model.causal_lm.model.embed_tokens(micro.input_ids)


@pytest.mark.parametrize("layout", [packed, padded])
def test_neftune_adds_uniform_noise_of_the_papers_size_for_each_samples_own_length(layout: object) -> None:
    added = noise(layout)
    rows = added[0].split([len(ids) for ids, _ in SAMPLES]) if layout is packed else added
    for row, (ids, _) in zip(rows, SAMPLES, strict=True):
        scaled = row[: len(ids)] * math.sqrt(len(ids) * 32) / 5.0
        assert 0.97 < scaled.abs().max() <= 1.00001
        assert abs(scaled.std() - 1 / math.sqrt(3)) < 0.05 and abs(scaled.mean()) < 0.1


def test_neftune_of_one_sample_is_that_of_transformers() -> None:
    embedding = tiny_causal_lm().model.embed_tokens.train()
    embedding.neftune_noise_alpha = 5.0
    ids = packed(SAMPLES[:1]).input_ids
    torch.manual_seed(3)
    expected = neftune_post_forward_hook(embedding, (ids,), embedding(ids)) - embedding(ids)
    assert torch.allclose(noise(lambda samples: packed(samples[:1])), expected, atol=1e-6)
