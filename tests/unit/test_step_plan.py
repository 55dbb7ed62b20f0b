"""The step plan: pure, complete, balanced, within limits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwlit.core.errors import ConfigError
from qwlit.data.order import Order
from qwlit.data.samples import Indices
from qwlit.data.step_plan import Limits, StepPlan, assign_micro_batches, num_steps
from qwlit.training.milestones import DueSteps


class Sized:
    """Samples that have a length and nothing else."""

    def __init__(self, lengths: list[int]) -> None:
        self._lengths = np.array(lengths, dtype=np.int32)

    def __len__(self) -> int:
        return len(self._lengths)

    def lengths(self, ids: Indices) -> np.ndarray:
        return self._lengths[ids]


def make_plan(lengths, *, global_batch_size=4, world_size=1, limits=None, packing=True, seed=0, order=None) -> StepPlan:
    order = order or Order.plain(seed, len(lengths))
    return StepPlan(Sized(lengths), order, global_batch_size, world_size, limits or Limits(), packing)


def test_every_epoch_sees_every_sample_once_also_where_a_step_straddles_two_epochs():
    plan = make_plan([5] * 10, global_batch_size=4)
    seen = np.concatenate([plan.samples(step) for step in range(5)])
    assert sorted(seen[:10]) == list(range(10))
    assert sorted(seen[10:20]) == list(range(10))
    assert list(seen[:10]) != list(seen[10:20])


def test_a_step_is_a_pure_function_of_seed_and_number():
    assert make_plan([5] * 50).samples(7).tolist() == make_plan([5] * 50).samples(7).tolist()
    assert make_plan([5] * 50).samples(7).tolist() != make_plan([5] * 50, seed=1).samples(7).tolist()


def test_a_step_is_the_orders_samples_at_its_positions():
    order = Order.weighted(3, (4, 6), (3, 1))
    plan = make_plan([5] * 10, global_batch_size=4, order=order)
    steps = [plan.samples(step).tolist() for step in range(7)]
    assert np.concatenate(steps).tolist() == order.at(np.arange(28)).tolist()
    assert plan.samples(3).tolist() == steps[3]


def test_a_layout_is_of_the_lengths_of_the_steps_samples():
    lengths = list(range(2, 42))
    plan = make_plan(lengths, global_batch_size=8, world_size=2, limits=Limits(max_tokens=60))
    for step in range(3):
        samples = plan.samples(step)
        expected = assign_micro_batches([lengths[i] for i in samples], 2, Limits(max_tokens=60), packing=True)
        assert plan.layout(samples) == expected


def test_an_epoch_of_a_weighted_order_has_as_many_steps_as_its_samples_fill():
    plan = make_plan([5] * 10, global_batch_size=4, order=Order.weighted(0, (2, 8), (1, 1)))
    assert [plan.steps_of_epochs(epochs) for epochs in range(4)] == [0, 3, 5, 8]


def test_fewer_samples_than_the_batch_repeat_within_a_step():
    samples = make_plan([5] * 3, global_batch_size=8).samples(0)
    assert len(samples) == 8
    assert {int(s) for s in samples} == {0, 1, 2}


@pytest.mark.parametrize(
    ("samples", "batch", "ends"), [(10, 4, [3, 5, 8, 10]), (3, 8, [1, 2, 3, 4]), (8, 4, [2, 4, 6, 8])]
)
def test_epoch_e_ends_at_step_ceil_of_e_n_over_g(samples, batch, ends):
    plan = make_plan([5] * samples, global_batch_size=batch)
    found = [plan.next_epoch_end(0)]
    while len(found) < 4:
        found.append(plan.next_epoch_end(found[-1]))
    assert found == ends


@pytest.mark.parametrize(
    ("epochs", "samples", "batch", "steps"),
    # As products of binary fractions 1.1 * 10, 0.07 * 100 and 1.15 * 100 are a little more than 11, 7 and 115.
    [
        *((0.5, 10, 4, 2), (0.5, 9, 1, 5), (1.5, 10, 4, 4), (1e-9, 10, 4, 1), (3, 10, 4, 8), (2**40, 3, 1, 3 * 2**40)),
        *((1.1, 10, 1, 11), (0.07, 100, 7, 1), (1.15, 100, 5, 23)),
    ],
)
def test_a_part_of_an_epoch_has_the_steps_that_its_share_of_the_samples_fills(epochs, samples, batch, steps):
    assert num_steps(epochs, samples, batch) == steps


@pytest.mark.parametrize(("epochs", "due"), [(0.5, [2]), (1.5, [3, 4]), (2, [3, 5])])
def test_a_run_of_a_part_of_an_epoch_validates_and_saves_at_each_end_of_an_epoch_and_after_its_last_step(epochs, due):
    plan = make_plan([5] * 10, global_batch_size=4)
    total = plan.steps_of_epochs(epochs)
    assert [step for step in range(1, 20) if step in DueSteps(total, None, plan.next_epoch_end)] == due


@pytest.mark.parametrize(
    ("every_steps", "each_epoch", "due"),
    [(4, False, [4, 8, 10]), (None, True, [3, 5, 8, 10]), (4, True, [3, 4, 5, 8, 10]), (50, False, [10])],
)
def test_a_rhythm_names_its_steps_and_the_last_one(every_steps, each_epoch, due):
    plan = make_plan([5] * 10, global_batch_size=4)
    rhythm = DueSteps(10, every_steps, plan.next_epoch_end if each_epoch else None)
    assert [step for step in range(1, 11) if step in rhythm] == due
    assert rhythm.next(10) is None


def test_a_run_of_a_billion_steps_is_planned_at_once():
    plan = make_plan([5] * 10, global_batch_size=4)
    late = 10**9
    assert DueSteps(2**40, None, plan.next_epoch_end).next(late) == late + 3


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=40),
    world_size=st.integers(1, 4),
    rows=st.one_of(st.none(), st.integers(1, 8)),
    tokens=st.one_of(st.none(), st.integers(60, 200)),
    packing=st.booleans(),
)
def test_a_layout_holds_every_sample_once_within_limits_and_ranks_have_equally_many(
    lengths, world_size, rows, tokens, packing
):
    ranks = assign_micro_batches(lengths, world_size, Limits(rows, tokens), packing=packing)
    assert len(ranks) == world_size
    assert len({len(micros) for micros in ranks}) == 1
    micros = [m for rank in ranks for m in rank]
    assert sorted(i for m in micros if not m.filler for i in m.members) == list(range(len(lengths)))
    for micro in micros:
        sizes = [lengths[i] for i in micro.members]
        assert rows is None or len(sizes) <= rows
        used = sum(sizes) if packing else max(sizes) * len(sizes)
        assert tokens is None or used <= tokens


def test_accumulation_under_a_row_limit_is_the_fewest_possible():
    for world_size, micro, expected in [(1, 2, 8), (1, 4, 4), (2, 4, 2), (4, 4, 1)]:
        ranks = assign_micro_batches(list(range(10, 26)), world_size, Limits(max_samples=micro), packing=True)
        assert {len(m) for m in ranks} == {expected}


def test_packed_ranks_are_balanced_by_tokens():
    lengths = np.random.default_rng(0).lognormal(5, 0.8, 64).astype(int).clip(8, 2000).tolist()
    ranks = assign_micro_batches(lengths, 4, Limits(), packing=True)
    loads = [sum(lengths[i] for m in micros for i in m.members) for micros in ranks]
    assert max(loads) < 1.1 * sum(loads) / 4 or max(loads) == max(lengths)


def test_a_sample_that_fits_no_micro_batch_is_refused_with_the_remedy():
    with pytest.raises(ConfigError, match="longest sample has 70 tokens; raise it to 70"):
        Limits(max_tokens=64).check(Sized([10, 70]))
    Limits(max_tokens=70).check(Sized([10, 70]))
    Limits(max_samples=1).check(Sized([10, 70]))
