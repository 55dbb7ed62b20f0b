"""The on-device rule for spikes, on synthetic series of gradient norms and losses."""

import math

import numpy as np
import pytest
import torch

from qwlit.training.resilience.spikes import FEWEST, WINDOW, SpikeDetector
from tests.long import LONG

STEPS = 10_000 if LONG else 600
BEGIN = 60


def gaussian(dice):
    return 0.3 * dice.standard_normal(STEPS)


def heavy_tails(dice):
    return 0.2 * dice.standard_t(3, STEPS)


def drifting(dice):
    steps = np.arange(STEPS)
    return 0.2 * dice.standard_normal(STEPS) + 1.5 * np.exp(-steps / 500) + 0.3 * np.sin(steps / 300)


def correlated(dice):
    noise, series = 0.1 * dice.standard_normal(STEPS), np.zeros(STEPS)
    for step in range(1, STEPS):
        series[step] = 0.95 * series[step - 1] + noise[step]
    return series


FAMILIES = [gaussian, heavy_tails, drifting, correlated]


def run(log_norms, factors=None):
    """Return for each step whether it was a spike; `factors` multiply the norms."""
    detector, dice = SpikeDetector(), np.random.default_rng(1)
    losses = 2.0 + 0.1 * dice.standard_normal(len(log_norms))
    norms = np.exp(log_norms) * (1 if factors is None else factors)
    return [
        bool(detector.judge(torch.tensor(float(norm)), torch.tensor(float(loss))))
        for norm, loss in zip(norms, losses, strict=True)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_at_most_three_in_a_thousand_healthy_steps_are_skipped(family):
    assert sum(run(family(np.random.default_rng(0)))) <= max(1, 3 * STEPS // 1000)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("factor", "recall"), [(30, 0.99), (100, 1.0)])
def test_spikes_are_found(family, factor, recall):
    factors, steps = np.ones(STEPS), np.arange(BEGIN, STEPS, 7)
    factors[steps] = factor
    found = run(family(np.random.default_rng(0)), factors)
    assert np.mean([found[step] for step in steps]) >= recall


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_no_spike_and_leaves_the_history_as_it_is(value):
    detector = SpikeDetector()
    for step in range(40):
        detector.judge(torch.tensor(1.0 + step % 3), torch.tensor(2.0))
    before = detector.history.clone()
    for norm, loss in ((value, 2.0), (1.0, value)):
        assert detector.judge(torch.tensor(norm), torch.tensor(loss)) == 0
        assert torch.equal(before.nan_to_num(-1), detector.history.nan_to_num(-1))


def test_a_burst_does_not_become_normal_and_the_step_after_it_is_accepted():
    found = run(np.zeros(400), np.where((np.arange(400) >= 100) & (np.arange(400) < 300), 50.0, 1.0))
    assert found == [100 <= step < 300 for step in range(400)]


def test_a_loss_far_above_the_others_is_a_spike_and_a_lower_one_is_not():
    detector = SpikeDetector()
    for _ in range(FEWEST):
        assert detector.judge(torch.tensor(1.0), torch.tensor(2.0)) == 0
    assert detector.judge(torch.tensor(1.0), torch.tensor(3.05)) == 1
    assert detector.judge(torch.tensor(1.0), torch.tensor(2.95)) == 0
    assert detector.judge(torch.tensor(0.001), torch.tensor(0.1)) == 0


@pytest.mark.parametrize(("share", "seed"), [(share, seed) for share in (0.1, 0.4) for seed in range(3)])
def test_hard_samples_among_easy_ones_are_no_spikes_in_steps_of_one_sample(share, seed):
    detector, dice, spikes = SpikeDetector(), np.random.default_rng(seed), 0
    for step in range(STEPS):
        # The model learns the easy samples by heart; their gradients vanish with their loss.
        easy = 0.1 + 6 * math.exp(-step / 60)
        loss = (3.0 if dice.random() < share else easy) * math.exp(0.1 * dice.standard_normal())
        spikes += int(detector.judge(torch.tensor(2 * loss / (1 + loss)), torch.tensor(loss)))
    assert spikes <= 3 * STEPS / 1000


def test_spikes_below_the_limit_do_not_raise_it_further_and_further():
    detector = SpikeDetector()
    found = []
    for step in range(300):
        norm = 1.3 ** max(0, step - 100) if step % 7 == 0 else 1.0
        found.append(bool(detector.judge(torch.tensor(norm), torch.tensor(2.0))) and norm > 20)
        assert found[-1] == (norm > 20)
    assert any(found)


def test_the_median_is_that_of_the_accepted_steps_also_while_there_are_few():
    detector, norms = SpikeDetector(), [1.0, 9.0, 2.0, 8.0, 3.0, 7.0, 4.0, 6.0, 5.0, 5.0]
    for norm in norms:
        detector.judge(torch.tensor(norm), torch.tensor(1.0))
    # The median of the logs is log 5, and their scale is large: a spike is a norm above 10 times the median.
    assert detector.judge(torch.tensor(51.0), torch.tensor(1.0)) == 1
    assert detector.judge(torch.tensor(49.0), torch.tensor(1.0)) == 0


def test_a_history_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 5\)"):
        SpikeDetector().load(torch.zeros(2, 5))
    detector = SpikeDetector()
    detector.load(torch.zeros(2, WINDOW))
    assert detector.judge(torch.tensor(100.0), torch.tensor(0.0)) == 1
