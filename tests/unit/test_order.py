from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwlit.core.errors import ConfigError
from qwlit.data.order import Order

MIXES = st.lists(st.tuples(st.integers(1, 30), st.floats(0.2, 5.0)), min_size=2, max_size=5)
SEEDS = st.integers(0, 2**40)


def first(order: Order, count: int) -> np.ndarray:
    return order.at(np.arange(count))


def weighted(seed: int, mix: list[tuple[int, float]]) -> Order | None:
    sizes, weights = zip(*mix, strict=True)
    try:
        return Order.weighted(seed, sizes, weights)
    except ConfigError:  # a part so light that it gets nothing of a few samples
        return None


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 40))
def test_a_plain_epoch_is_every_sample_once_and_no_two_are_alike(seed: int, size: int) -> None:
    order = Order.plain(seed, size)
    assert order.epoch_length == size
    epochs = first(order, 3 * size).reshape(3, size)
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    if size > 20:
        assert len({epoch.tobytes() for epoch in epochs}) == 3


@settings(max_examples=100, deadline=None)
@given(SEEDS, MIXES)
def test_a_weighted_epoch_draws_each_part_by_its_exact_quota(seed: int, mix: list[tuple[int, float]]) -> None:
    order = weighted(seed, mix)
    if order is None:
        return
    sizes, weights = (np.array(column) for column in zip(*mix, strict=True))
    assert order.epoch_length == sizes.sum()
    exact = weights / weights.sum() * sizes.sum()
    assert np.all(np.abs(np.array(order.quotas) - exact) < 1)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    times_seen = np.zeros(sizes.sum(), dtype=int)
    for epoch in first(order, 4 * sizes.sum()).reshape(4, -1):
        assert np.bincount(owner[epoch], minlength=len(sizes)).tolist() == list(order.quotas)
        times_seen += np.bincount(epoch, minlength=sizes.sum())
        assert all(np.ptp(times_seen[owner == part]) <= 1 for part in range(len(sizes)))


@settings(max_examples=100, deadline=None)
@given(SEEDS, MIXES)
def test_no_sample_of_a_part_is_seen_twice_before_all_are_seen_once(seed: int, mix: list[tuple[int, float]]) -> None:
    order = weighted(seed, mix)
    if order is None:
        return
    seen = first(order, 6 * order.epoch_length)
    start = 0
    for size, _ in mix:
        drawn = seen[(seen >= start) & (seen < start + size)] - start
        for turn in range(0, len(drawn) - size + 1, size):
            assert sorted(drawn[turn : turn + size]) == list(range(size))
        rest = drawn[len(drawn) // size * size :]
        assert len(set(rest)) == len(rest)
        start += size


@settings(max_examples=60, deadline=None)
@given(SEEDS, MIXES, st.data())
def test_the_order_is_a_pure_function_of_seed_and_position(
    seed: int, mix: list[tuple[int, float]], data: st.DataObject
) -> None:
    order = weighted(seed, mix) or Order.plain(seed, mix[0][0])
    total = 4 * order.epoch_length
    whole = first(order, total)
    cuts = sorted({0, total, *data.draw(st.lists(st.integers(0, total), max_size=6))})
    slices = [np.arange(a, b) for a, b in pairwise(cuts)]
    assert np.array_equal(np.concatenate([order.at(positions) for positions in slices]), whole)
    fresh = Order(order.seed, order.sizes, order.quotas)
    for positions in reversed(slices):
        assert np.array_equal(fresh.at(positions), whole[positions])
    late = data.draw(st.integers(0, total - 1))
    assert Order(order.seed, order.sizes, order.quotas).at(np.array([late])) == whole[late]


def test_seeds_and_parts_are_shuffled_apart() -> None:
    orders = [first(Order.plain(seed, 50), 50).tolist() for seed in (0, 1, 2**40)]
    assert orders[0] != orders[1] != orders[2]
    # By the places that a plain epoch of as many samples gives them, so that what mixes the parts drops out.
    places = np.argsort(first(Order.plain(0, 100), 100))
    mixed = first(Order.weighted(0, (50, 50), (1, 1)), 100)[places]
    assert (mixed[mixed < 50]).tolist() != (mixed[mixed >= 50] - 50).tolist()


def test_parts_are_mixed_within_an_epoch() -> None:
    drawn = first(Order.weighted(0, (500, 500), (1, 1)), 1000) < 500
    assert all(30 < part.sum() < 70 for part in drawn.reshape(10, 100))


def test_positions_far_away_are_reached_at_once() -> None:
    order = Order.weighted(3, (7, 90), (5, 1))
    far = np.arange(2**40, 2**40 + 5)
    assert order.at(far).tolist() == Order.weighted(3, (7, 90), (5, 1)).at(far).tolist()


@pytest.mark.parametrize(
    ("sizes", "weights", "quotas"),
    [((10, 10), (1, 1), (10, 10)), ((10, 90), (1, 1), (50, 50)), ((5, 5, 1), (1, 1, 1), (4, 4, 3)), ((3,), (7,), (3,))],
)
def test_quotas_are_shares_of_all_samples(
    sizes: tuple[int, ...], weights: tuple[float, ...], quotas: tuple[int, ...]
) -> None:
    assert Order.weighted(0, sizes, weights).quotas == quotas


def test_a_weight_too_small_to_matter_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"weight 1e-06 of part 2 gives it none of an epoch's 1,100 samples; raise"):
        Order.weighted(0, (1000, 100), (1.0, 1e-6))


def test_a_part_without_samples_is_an_error() -> None:
    with pytest.raises(ConfigError, match="part 2 has no sample to draw; remove it"):
        Order.weighted(0, (10, 0), (1.0, 1.0))
