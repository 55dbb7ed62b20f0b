"""Each optimizer against the library's own, clipping and skipping."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from qwlit.optim.config import GroupRule, OptimConfig, OptimizerName
from qwlit.optim.groups import plan_groups
from qwlit.optim.optimizers import build_optimizer, set_clip_and_skip, set_learning_rate


def built(model, **settings):
    """An optimizer, and the group that all parameters are in."""
    config = OptimConfig(**({"lr": 1e-2} | settings))
    return build_optimizer(plan_groups(model.named_parameters(), config), config)


OPTIMIZERS: list[OptimizerName] = ["adamw", "muon", "sgd", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]


class Pair(nn.Module):
    """A matrix large enough for 8-bit moments, and a bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(80, 60)


def gradients(model, step, size=1.0):
    torch.manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn_like(p) * size


def after(model, optimizer, clip=None, steps=3):
    for step in range(steps):
        gradients(model, step)
        if clip:
            clip(model, optimizer)
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


KEPT, SKIPPED = torch.tensor(0.0), torch.tensor(1.0)


def inside(model, optimizer):
    set_clip_and_skip(optimizer, nn.utils.get_total_norm([p.grad for p in model.parameters()]), 1.0, KEPT)


def outside(model, optimizer):
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clipping_inside_the_optimizer_equals_torchs_own(name):
    first, second = Pair(), Pair()
    ours = after(first, built(first, name=name, weight_decay=0.1), inside)
    plain = after(second, built(second, name=name, weight_decay=0.1), outside)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def theirs(name, model):
    """The library's optimizers as their documentation says one uses them."""
    import bitsandbytes

    # What it remembers of other tests' parameters, by their address.
    bitsandbytes.optim.GlobalOptimManager.get_instance().initialize()
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
    if name == "muon":
        matrices = torch.optim.Muon([model.proj.weight], **options, momentum=0.9, adjust_lr_fn="match_rms_adamw")
        return [matrices, torch.optim.AdamW([model.proj.bias], **options)]
    classes = {
        "adamw": torch.optim.AdamW,
        "sgd": torch.optim.SGD,
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,
        "paged_adamw": bitsandbytes.optim.PagedAdamW32bit,
        "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
    }
    return [
        classes[name](model.parameters(), **options, **({"momentum": 0.9, "nesterov": True} if name == "sgd" else {}))
    ]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_is_the_librarys(name):
    first, second = Pair(), Pair()
    ours = after(first, built(first, name=name, weight_decay=0.1, momentum=0.9))
    libraries = theirs(name, second)
    for step in range(3):
        gradients(second, step)
        for optimizer in libraries:
            optimizer.step()
    plain = torch.cat([p.detach().flatten() for p in second.parameters()])
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-7)


def test_amsgrad_is_passed_on():
    one, two = Pair(), Pair()
    assert not torch.equal(after(one, built(one, amsgrad=True), steps=9), after(two, built(two), steps=9))


def snapshot(optimizer):
    state = optimizer.state_dict()["state"]
    return {(number, key): copy.deepcopy(v) for number, values in state.items() for key, v in values.items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_step_with_a_non_finite_norm_leaves_weights_moments_and_count_untouched(name, bad, steps_before):
    model, never = Pair(), Pair()
    optimizer, other = built(model, name=name), built(never, name=name)
    after(model, optimizer, inside, steps_before)
    after(never, other, inside, steps_before)
    gradients(model, 9)
    model.proj.weight.grad[0, 0] = bad
    set_clip_and_skip(optimizer, torch.tensor(bad), 1.0, SKIPPED)
    optimizer.step()
    left, right = snapshot(optimizer), snapshot(other)
    for key, value in left.items():
        same = right.get(key)
        # A moment that the skipped step has made is a zero.
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(0.0 * value if same is None else same)), key
    # What the skipped step has left behind does no harm to the next.
    assert torch.equal(after(model, optimizer, inside, 1), after(never, other, inside, 1))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_goes_into_another_process_and_on_to_the_same_bits(name):
    model, again = Pair(), Pair()
    optimizer = built(model, name=name)
    after(model, optimizer)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    expected = after(model, optimizer)
    again.load_state_dict(weights)
    restored = built(again, name=name)
    restored.load_state_dict(saved)
    assert torch.equal(after(again, restored), expected)


def test_moments_are_8_bit_but_for_embedding_and_head():
    model = nn.ModuleDict({"embed_tokens": nn.Embedding(80, 60), "proj": nn.Linear(80, 60)})
    optimizer = built(model, name="adamw_8bit")
    after(model, optimizer, steps=1)
    dtypes = [state["state1"].dtype for state in optimizer.state_dict()["state"].values()]
    assert dtypes == [torch.float32, torch.uint8, torch.float32]


def test_each_group_follows_the_schedule_from_its_own_peak():
    model = Pair()
    optimizer = built(model, groups=(GroupRule(match="proj.bias", lr_multiplier=3.0),))
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([2.5e-3, 7.5e-3])


def test_an_earlier_run_in_the_same_process_leaves_no_mark_on_the_next():
    for _ in range(20):
        embedding = nn.ModuleDict({"embed_tokens": nn.Embedding(80, 60)})
        built(embedding, name="adamw_8bit")
        del embedding
        model = nn.ModuleDict({"proj": nn.Linear(60, 80, bias=False)})
        optimizer = built(model, name="adamw_8bit")
        after(model, optimizer, steps=1)
        assert optimizer.state_dict()["state"][0]["state1"].dtype == torch.uint8
