"""FLOPs counted from the shape against those that torch counts while it computes, and against the published formula."""

import pytest
from torch.utils.flop_counter import FlopCounterMode

from qwlit.config.compose import compose
from qwlit.model.adapters import apply_adapter
from qwlit.model.attention import register_attention
from qwlit.model.config import AdapterConfig, FreezeConfig
from qwlit.model.flops import count_flops
from qwlit.model.freeze import apply_freeze
from qwlit.model.load import model_shape
from qwlit.model.loss_model import LossModel
from qwlit.model.presets import meta_causal_lm
from tests.tiny import packed, random_samples, tiny_causal_lm

LENGTHS = [24, 24]


def counted_by_torch(model):
    model.set_attn_implementation(register_attention())
    with FlopCounterMode(display=False) as counter:
        LossModel(model, "eager").train()(packed(random_samples(LENGTHS))).loss_sum.backward()
    return counter.get_total_flops()


def counted(model):
    flops = count_flops(model)
    supervised = len(packed(random_samples(LENGTHS)).targets)
    # Eager attention also computes what the causal mask throws away.
    pairs = sum(length**2 for length in LENGTHS)
    return flops.of(num_tokens=sum(LENGTHS), num_supervised_tokens=supervised, num_token_pairs=pairs)


@pytest.mark.parametrize(("family", "tied"), [("qwen3", True), ("qwen2", False)])
@pytest.mark.parametrize(
    "freeze",
    [
        FreezeConfig(),
        FreezeConfig(parameters=("attention",)),
        FreezeConfig(parameters=("embedding",)),
        FreezeConfig(parameters=("embedding",), layers=(0, 0)),
    ],
    ids=["full", "attention", "embedding", "lower half"],
)
def test_what_torch_counts_in_a_step_is_what_the_shape_says(family, tied, freeze):
    model = tiny_causal_lm(family, tied=tied)
    apply_freeze(model, freeze)
    # The first trained layer needs no gradient of its own input, which the count does not look into.
    assert counted(model) == pytest.approx(counted_by_torch(model), rel=0.06 if freeze.parameters else 1e-9)


def test_lora_costs_four_flops_a_frozen_weight():
    model = tiny_causal_lm()
    apply_adapter(model, AdapterConfig(kind="lora", rank=2), dropout=0.0, seed=0)
    attention = model.model.layers[0].self_attn
    entering = [attention.q_proj, attention.k_proj, attention.v_proj]
    # Below the first adapters nothing is trained, so that nobody needs the gradient of what enters them.
    unneeded = sum(p.numel() for linear in entering for name, p in linear.named_parameters() if "lora_B" not in name)
    assert counted(model) == pytest.approx(counted_by_torch(model) + 2 * sum(LENGTHS) * unneeded)


def test_qwen3_0_6b_costs_2642_mflop_a_token_934_a_supervised_one_and_a_third_of_a_mflop_per_token_before_it():
    flops = count_flops(meta_causal_lm(model_shape(compose([]).config.model)))
    # The last feed-forward block, three matrices of 1024 x 3072, is computed in supervised rows alone.
    last = 6 * 3 * 1024 * 3072
    assert flops.per_token == pytest.approx(2.642e9 - last, rel=1e-3)
    assert flops.per_supervised_token == pytest.approx(0.934e9 + last, rel=1e-3)
    # A document of length L has L * L / 2 pairs: 0.000344 GFLOP a token and position.
    assert flops.per_token_pair / 2 == pytest.approx(0.000344e9, rel=1e-3)


def test_frozen_layers_at_the_bottom_are_computed_forward_alone():
    def freely(**settings):
        model = tiny_causal_lm()
        apply_freeze(model, FreezeConfig(**settings))
        return count_flops(model)

    def whole(flops):
        return flops.per_token + flops.per_supervised_token

    head = 2.0 * tiny_causal_lm().lm_head.weight.numel()
    layers = whole(freely()) - 3 * head
    assert whole(freely(parameters=("embedding",))) == pytest.approx(layers + 2 * head)
    assert whole(freely(parameters=("embedding",), layers=(0, 0))) == pytest.approx(layers * (2 + 6) / 12 + 2 * head)
