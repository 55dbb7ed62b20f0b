"""Gauges of a step, against what torch computes and what the optimizer does."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qwlit.training.step_gauges import ACTIVATION_NORM, SAMPLED, StepGauges

LR = 0.1


class Logged:
    def log(self, step):
        return True


def after_a_step(weights: dict[str, list[nn.Parameter]], *, skipped=0.0, max_grad_norm=None, outputs=()):
    """Measure a step of plain gradient descent."""
    groups = [{"name": name, "params": params} for name, params in weights.items()]
    optimizer = torch.optim.SGD(groups, lr=LR)
    last_layer = nn.Identity()
    family = SimpleNamespace(final_norm=lambda causal_lm: last_layer)
    outcome = SimpleNamespace(skipped=torch.tensor(skipped), grad_norm=torch.tensor(5.0))
    module = SimpleNamespace(
        optimizers=lambda use_pl_optimizer: optimizer,
        device=torch.device("cpu"),
        loss_scale=None,
        is_sharded=False,
        outcome=outcome,
        loss_model=SimpleNamespace(family=family, causal_lm=None),
    )
    trainer, gauges = SimpleNamespace(world_size=1), StepGauges(Logged(), max_grad_norm)
    gauges.on_train_start(trainer, module)
    batch = SimpleNamespace(step=0)
    gauges.on_train_batch_start(trainer, module, batch, 0)
    for output in outputs:
        last_layer(output)
    for parameter in (p for group in weights.values() for p in group):
        torch.manual_seed(parameter.numel())
        parameter.grad = torch.randn_like(parameter)
    gauges.on_before_optimizer_step(trainer, module, optimizer)
    if not skipped:
        optimizer.step()
    gauges.on_train_batch_end(trainer, module, None, batch, 0)
    last_layer(torch.full((2, 2), torch.nan))  # a validation between the steps
    return gauges


def weights(*sizes):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(size)) for size in sizes]


def test_each_group_has_its_own_norm_and_update():
    groups = {"decay": weights((30, 40), (7,)), "no_decay": weights(9)}
    before = {name: torch.cat([p.detach().flatten() for p in group]) for name, group in groups.items()}
    measured = after_a_step(groups).take()
    for name, group in groups.items():
        gradient = torch.cat([p.grad.flatten() for p in group])
        assert measured[f"optim/grad_norm/{name}"].item() == pytest.approx(gradient.norm().item(), rel=1e-6)
        ratio = LR * gradient.norm() / before[name].norm()
        assert measured[f"optim/update_ratio/{name}"].item() == pytest.approx(ratio.item(), rel=1e-5)


def test_a_sample_of_a_large_tensor_stands_for_it():
    groups = {"decay": weights((300, 400))}
    (weight,) = groups["decay"]
    norm = weight.detach().norm()
    gauges = after_a_step(groups)
    assert SAMPLED / 2 <= sum(len(view) for view in gauges._samples[0]) <= SAMPLED
    ratio = gauges.take()["optim/update_ratio/decay"].item()
    assert ratio == pytest.approx((LR * weight.grad.norm() / norm).item(), rel=0.05)


def test_weights_that_begin_at_zero_have_no_infinite_ratio():
    measured = after_a_step({"B": [nn.Parameter(torch.zeros(3, 3))]}).take()
    assert measured["optim/update_ratio/B"] == 0 and measured["optim/grad_norm/B"] > 0


@pytest.mark.parametrize(
    ("skipped", "limit", "shares"), [(0, None, [0, 0]), (0, 1.0, [1, 0]), (0, 9.0, [0, 0]), (1, 1.0, [0, 1])]
)
def test_a_clipped_step_and_a_skipped_step_are_counted_until_the_next_record(skipped, limit, shares):
    gauges = after_a_step({"decay": weights(4)}, skipped=float(skipped), max_grad_norm=limit)
    kept = gauges.state_dict()
    measured = gauges.take()
    assert [measured["optim/clipped_share"], measured["optim/skipped_share"]] == shares
    resumed = StepGauges(Logged(), limit)
    resumed.load_state_dict(kept)
    assert [resumed.take()["optim/clipped_share"], gauges.take()["optim/clipped_share"]] == [shares[0], 0]


def test_the_last_layers_output_is_measured_over_all_micro_batches_of_the_step():
    torch.manual_seed(1)
    outputs = torch.randn(3, 8), 5 * torch.randn(40, 8)
    measured = after_a_step({"decay": weights(4)}, outputs=outputs).take()
    expected = torch.cat(outputs).square().mean().sqrt()
    assert measured[ACTIVATION_NORM].item() == pytest.approx(expected.item(), rel=1e-6)
