"""Groups, clipping and skipping."""

import copy

import pytest
import torch
from torch import nn

from qwlit.optim.config import OptimConfig
from qwlit.optim.groups import kind, parameter_groups
from qwlit.optim.optimizers import arm_clip_and_skip, build_optimizer


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "weight"),
        ("model.layers.0.self_attn.q_proj.bias", "bias"),
        ("model.layers.0.self_attn.q_norm.weight", "norm"),
        ("model.layers.0.input_layernorm.weight", "norm"),
        ("model.norm.weight", "norm"),
        ("model.embed_tokens.weight", "weight"),
    ],
)
def test_kinds_of_qwen_parameters(name, expected):
    assert kind(name) == expected


def test_every_trainable_parameter_is_in_exactly_one_group_and_frozen_ones_in_none():
    model = nn.ModuleDict({"proj": nn.Linear(2, 2), "norm": nn.LayerNorm(2), "frozen": nn.Linear(2, 2)})
    model["frozen"].requires_grad_(False)
    config = OptimConfig(lr=1e-3, weight_decay=0.1, no_decay=("bias", "norm"))
    decay, no_decay = parameter_groups(model.named_parameters(), config)
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.1, 0.0)
    assert [id(p) for p in decay["params"]] == [id(model["proj"].weight)]
    assert {id(p) for p in no_decay["params"]} == {id(p) for p in (model["proj"].bias, *model["norm"].parameters())}


def trained(clip):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = build_optimizer(model.named_parameters(), OptimConfig(lr=1e-2, weight_decay=0.1))
    for _ in range(3):
        model(torch.randn(5, 4)).pow(2).sum().mul(10).backward()
        clip(model, optimizer)
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_clipping_inside_the_optimizer_equals_torchs_own():
    def inside(model, optimizer):
        arm_clip_and_skip(optimizer, nn.utils.get_total_norm([p.grad for p in model.parameters()]), 1.0)

    def outside(model, optimizer):
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    torch.testing.assert_close(trained(inside), trained(outside), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_with_a_non_finite_norm_leaves_weights_moments_and_count_untouched(bad):
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model.named_parameters(), OptimConfig(lr=1e-2))
    model(torch.ones(1, 2)).sum().backward()
    arm_clip_and_skip(optimizer, torch.tensor(1.0), 1.0)
    optimizer.step()
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    model.weight.grad[0, 0] = bad
    assert arm_clip_and_skip(optimizer, torch.tensor(bad), 1.0) == 1.0
    optimizer.step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name])
    for number, entries in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state[number][name]) for name, value in entries.items())
