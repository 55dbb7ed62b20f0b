"""Dropout: on in training, off in evaluation, reproducible, and absent at 0."""

import pytest
import torch

from qwlit.model.attention import register_attention
from qwlit.model.config import DropoutConfig
from qwlit.model.dropout import apply_dropout
from qwlit.model.loss_model import LossModel
from tests.tiny import packed, padded, random_samples, tiny_causal_lm

SAMPLES = random_samples([9, 14, 5])


def model_with(kernel: str = "sdpa", **dropout: float) -> LossModel:
    causal_lm = tiny_causal_lm()
    causal_lm.set_attn_implementation(register_attention())
    apply_dropout(causal_lm, DropoutConfig(**dropout))
    return LossModel(causal_lm, kernel)  # type: ignore[arg-type]


def loss(model: LossModel, seed: int, layout: object = packed) -> float:
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(layout(SAMPLES)).loss_sum.item()  # type: ignore[operator]


@pytest.mark.parametrize("layout", [packed, padded])
@pytest.mark.parametrize("kernel", ["sdpa", "eager", "varlen"])
@pytest.mark.parametrize("place", ["attention", "feed_forward"])
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


def test_the_right_share_of_feed_forward_outputs_is_dropped_and_the_rest_scaled_up() -> None:
    model = model_with(feed_forward=0.25).train()
    mlp = model.causal_lm.model.layers[0].mlp
    x = torch.randn(200, 32)
    out, kept = mlp(x), mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)) / 0.75
    dropped = out == 0
    assert abs(dropped.float().mean().item() - 0.25) < 0.02
    assert torch.allclose(out[~dropped], kept[~dropped])
