"""Optimizer groups: each trained parameter in exactly one, with the rate and decay that one computes by hand."""

import pytest
import torch

from qwlit.core.errors import ConfigError
from qwlit.model.adapters import apply_adapter
from qwlit.model.config import AdapterConfig, FreezeConfig
from qwlit.model.freeze import apply_freeze
from qwlit.optim.config import GroupRule, OptimConfig
from qwlit.optim.groups import plan_groups
from tests.tiny import tiny_causal_lm

LR = 1e-3


def planned(model=None, **settings):
    model = model or tiny_causal_lm("qwen2", tied=False)
    groups = plan_groups(model.named_parameters(), OptimConfig(lr=LR, weight_decay=0.1, **settings))
    owned = [name for group in groups for name in group.parameters]
    assert sorted(owned) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    return groups


def of(groups, name):
    (found,) = [group for group in groups if name in group.parameters]
    return found


def test_bias_and_norm_do_not_decay_where_the_stage_says_so():
    groups = planned(no_decay=("bias", "norm"))
    assert [(group.name, group.weight_decay) for group in groups] == [("decay", 0.1), ("no_decay", 0.0)]
    assert all(name.endswith("bias") or "norm" in name for name in groups[1].parameters)
    assert len(groups[1].parameters) == 2 * (3 + 2) + 1
    assert [group.weight_decay for group in planned()] == [0.1]


def test_frozen_parameters_are_in_no_group():
    model = tiny_causal_lm()
    model.model.embed_tokens.weight.requires_grad_(False)
    assert all("embed" not in name for group in planned(model) for name in group.parameters)


def test_of_several_rules_the_first_that_matches_counts():
    rules = (
        GroupRule(match="q_proj.bias", lr=7e-5),
        GroupRule(match="attention", layers=(1, 1), lr_multiplier=0.5, weight_decay=0.3),
        GroupRule(match="bias", weight_decay=0.2),
        GroupRule(match="norm", lr_multiplier=2.0),
    )
    groups = planned(groups=rules, no_decay=("bias", "norm"))
    expected = {
        "model.layers.1.self_attn.q_proj.bias": ("q_proj.bias", 7e-5, 0.0),
        "model.layers.1.self_attn.k_proj.bias": ("attention, layers 1-1", LR / 2, 0.3),
        "model.layers.1.self_attn.k_proj.weight": ("attention, layers 1-1", LR / 2, 0.3),
        "model.layers.0.self_attn.k_proj.bias": ("bias", LR, 0.2),
        "model.layers.0.self_attn.k_proj.weight": ("decay", LR, 0.1),
        "model.norm.weight": ("norm", 2 * LR, 0.0),
        "lm_head.weight": ("decay", LR, 0.1),
    }
    for name, values in expected.items():
        group = of(groups, name)
        assert (group.name, pytest.approx(group.lr), group.weight_decay) == values, name


def test_the_rate_falls_from_layer_to_layer_down_to_the_embedding():
    groups = planned(layer_lr_decay=0.5, groups=(GroupRule(match="norm", lr=9e-4),))
    for name, lr in {
        "lm_head.weight": LR,
        "model.layers.1.mlp.up_proj.weight": LR / 2,
        "model.layers.0.mlp.up_proj.weight": LR / 4,
        "model.embed_tokens.weight": LR / 8,
        "model.layers.0.input_layernorm.weight": 9e-4,
    }.items():
        assert of(groups, name).lr == pytest.approx(lr), name


def test_the_rate_of_a_layer_does_not_depend_on_what_else_is_trained():
    model = tiny_causal_lm()
    apply_freeze(model, FreezeConfig(parameters=("embedding", "model.norm"), layers=(1, 1)))
    (group,) = planned(model, layer_lr_decay=0.5)
    assert (group.name, group.lr) == ("decay, layer 0", pytest.approx(LR / 4))
    # Layer 1 is one of the model's, though none of it is trained.
    (rule, rest) = planned(model, groups=(GroupRule(match="mlp", layers=(0, 1), lr=1e-5),))
    assert all("layers.0.mlp" in name for name in (rest if rule.name == "decay" else rule).parameters)


def test_groups_of_different_rates_have_different_names():
    model = tiny_causal_lm(tied=False)
    apply_adapter(model, AdapterConfig(kind="lora", rank=2), dropout=0.0, seed=0)
    names = [group.name for group in planned(model, lora_plus_ratio=16.0, layer_lr_decay=0.9)]
    assert names == ["decay, layer 0", "decay, layer 0, LoRA B", "decay, layer 1", "decay, layer 1, LoRA B"]
    names = [group.name for group in planned(tiny_causal_lm(tied=False), layer_lr_decay=0.9)]
    assert names == ["decay, embedding", "decay, layer 0", "decay, layer 1", "decay"]


def test_lora_plus_raises_the_rate_of_b_alone():
    model = tiny_causal_lm()
    apply_adapter(model, AdapterConfig(kind="lora", rank=2), dropout=0.0, seed=0)
    rates = {name: group.lr for group in planned(model, lora_plus_ratio=16.0) for name in group.parameters}
    assert {rate for name, rate in rates.items() if ".lora_A." in name} == {LR}
    assert {rate for name, rate in rates.items() if ".lora_B." in name} == {16 * LR}


def test_muon_takes_the_matrices_between_embedding_and_head():
    algorithms = {name: g.algorithm for g in planned(name="muon", no_decay=("norm",)) for name in g.parameters}
    assert {name for name, algorithm in algorithms.items() if algorithm == "muon"} == {
        name for name in algorithms if name.endswith("proj.weight")
    }


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"groups": (GroupRule(match="q_prj", lr=1.0),)}, r"optim.groups\[0\]: 'q_prj' matches no trained parameter"),
        ({"groups": (GroupRule(match="norm"),)}, r"optim.groups\[0\] sets nothing"),
        ({"groups": (GroupRule(match="norm", lr=1.0, lr_multiplier=2.0),)}, "both set"),
        (
            {"groups": (GroupRule(match="attention", lr=1.0), GroupRule(match="q_proj", lr=2.0))},
            r"optim.groups\[1\]: earlier rules match all parameters of 'q_proj'",
        ),
        ({"lora_plus_ratio": 16.0}, "the model has none; use recipe=lora"),
    ],
)
def test_a_rule_that_does_nothing_is_an_error(settings, said):
    with pytest.raises(ConfigError, match=said):
        planned(tiny_causal_lm(), **settings)


def test_sizes_add_up_to_all_that_is_trained():
    model = tiny_causal_lm()
    assert sum(group.size for group in planned(model, no_decay=("norm",))) == sum(
        torch.tensor(p.shape).prod() for p in model.parameters()
    )
