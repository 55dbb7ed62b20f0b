"""Schedules at points one can compute by hand."""

import pytest

from qwlit.optim.config import SchedulerConfig
from qwlit.optim.schedules import Schedule


def schedule(name, total=110, **settings):
    return Schedule(SchedulerConfig(name=name, **settings), total)


@pytest.mark.parametrize("name", ["cosine", "linear", "exponential", "constant", "wsd"])
def test_warm_up_rises_linearly_and_its_last_step_is_at_the_peak(name):
    s = schedule(name, warmup_steps=10, min_lr_ratio=0.01)
    assert [s.lr_multiplier(t) for t in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])


@pytest.mark.parametrize(
    ("name", "floor", "middle", "end"),
    [
        ("cosine", 0.0, 0.5, 0.0),
        ("cosine", 0.1, 0.55, 0.1),
        ("linear", 0.0, 0.5, 0.0),
        ("linear", 0.2, 0.6, 0.2),
        ("exponential", 0.01, 0.1, 0.01),
        ("constant", 0.0, 1.0, 1.0),
    ],
)
def test_decay_halfway_and_at_the_end(name, floor, middle, end):
    s = schedule(name, warmup_steps=10, min_lr_ratio=floor)
    assert s.lr_multiplier(60) == pytest.approx(middle)
    assert s.lr_multiplier(110) == pytest.approx(end, abs=1e-12)


def test_a_ratio_is_a_share_of_the_run():
    assert schedule("linear", warmup_ratio=0.1).warmup_steps == 11


def test_warm_up_steps_are_capped_at_the_recipes_share():
    assert schedule("cosine", warmup_steps=2000, max_warmup_ratio=0.2).warmup_steps == 22
    assert schedule("cosine", warmup_steps=100).warmup_steps == 100


def test_warm_up_that_one_types_is_not_cut_short_by_a_shorter_run():
    s = schedule("linear", total=4, warmup_steps=10)
    assert [s.lr_multiplier(t) for t in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_a_run_of_nothing_but_warm_up_is_defined():
    s = schedule("linear", total=5, warmup_steps=5)
    assert [s.lr_multiplier(t) for t in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_wsd_stays_at_the_peak_and_falls_over_the_last_part_of_the_run():
    s = schedule("wsd", total=100, warmup_steps=10, decay_ratio=0.2, min_lr_ratio=0.1)
    factors = [s.lr_multiplier(t) for t in (0, 9, 10, 79, 80, 90, 100)]
    assert factors == pytest.approx([0.1, 1.0, 1.0, 1.0, 1.0, 0.55, 0.1])


def test_wsd_with_more_warm_up_than_is_left_falls_after_it():
    s = schedule("wsd", total=100, warmup_steps=90, decay_ratio=0.2)
    assert [s.lr_multiplier(t) for t in (89, 90, 95)] == pytest.approx([1.0, 1.0, 0.5])
