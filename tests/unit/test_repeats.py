"""Several seeds: mean, deviation, confidence interval, Welch's test and the seeds it takes, against references."""

import pytest

from qwlit.report.repeats import find_repeats, judge, table_of
from qwlit.report.student import Estimate, critical, estimate, samples_needed, two_sided, welch
from tests.reports import comparison_of, page_of, write_run

LOW, HIGH = [2.31, 2.35, 2.29, 2.40, 2.33], [2.41, 2.38, 2.52, 2.44]


def test_probabilities_and_quantiles_are_those_of_scipy():
    # 2 * scipy.stats.t.sf(t, freedom) and scipy.stats.t.ppf(0.975, freedom) of scipy 1.17.
    for t, freedom, probability in [
        (0.001, 3, 0.9992648949694609),
        (0.5, 1, 0.7048327646991335),
        (2.0, 1.7, 0.20549011285266228),
        (5, 3.3, 0.012214421128087875),
        (1.96, 200, 0.051384840845813295),
        (12, 7.25, 4.8139194529047434e-06),
    ]:
        assert two_sided(t, freedom) == pytest.approx(probability, rel=1e-11)
        assert two_sided(-t, freedom) == two_sided(t, freedom)
    for freedom, t in [(1, 12.706204736174694), (4, 2.7764451051977934), (30, 2.0422724563012378)]:
        assert critical(0.05, freedom) == pytest.approx(t, rel=1e-11)


def test_interval_and_welch_are_those_of_scipy():
    # scipy.stats.t.interval(0.95, 4, mean, sem) and scipy.stats.ttest_ind(LOW, HIGH, equal_var=False).
    low, high = estimate(LOW), estimate(HIGH)
    assert (low.mean, low.deviation) == pytest.approx((2.336, 0.042190046219457926))
    assert low.mean - low.half_width == pytest.approx(2.283614138526746, rel=1e-12)
    assert high.mean + high.half_width == pytest.approx(2.5333043204425048, rel=1e-12)
    assert welch(low, high) == welch(high, low) == pytest.approx(0.03385555826778158, rel=1e-11)


@pytest.mark.parametrize(("effect", "exact"), [(0.1, 1570.7), (0.3, 175.4), (0.5, 63.8), (1.0, 16.7), (2.0, 5.1)])
def test_the_seeds_it_takes_are_those_of_the_noncentral_t_distribution(effect, exact):
    # statsmodels.stats.power.TTestIndPower().solve_power(effect, alpha=0.05, power=0.8)
    assert abs(samples_needed(Estimate(5, 0, 1, 0), Estimate(5, effect, 1, 0)) - exact) < 1


def test_values_that_do_not_vary_differ_by_any_difference():
    one, same, other = (estimate([value] * 3) for value in (1.0, 1.0, 1.5))
    assert (one.half_width, welch(one, same), welch(one, other)) == (0, 1, 0)
    assert samples_needed(one, other) == 2


def write_seeds(folder, values, lr, **manifest):
    """A run for each value, with seeds of its own."""
    return [
        write_run(folder / f"lr{lr}-seed{seed}", {"optim.lr": lr, "seed": seed}, val, manifest=manifest)
        for seed, val in enumerate(values)
    ]


def test_the_report_says_whether_settings_differ_by_more_than_their_seeds(tmp_path):
    runs = write_seeds(tmp_path, LOW, 1) + write_seeds(tmp_path, HIGH, 2) + write_seeds(tmp_path, [2.34, 2.36], 3)
    comparison = comparison_of(*runs, write_run(tmp_path / "alone", {"optim.lr": 4, "seed": 9}))
    groups = find_repeats(comparison)
    assert [group.settings for group in groups] == ["optim.lr=1", "optim.lr=3", "optim.lr=2"]
    assert ["optim.lr=1", "5", "val/loss", "2.336", "± 0.052", "0.042"] in table_of(groups).lines
    near, far = judge(comparison, groups)
    assert far.differs and far.difference == pytest.approx(0.1015)
    assert far.text().startswith("optim.lr=2 against optim.lr=1: +0.102 in val/loss (Welch's test, p = 0.034), more")
    assert not near.differs and "not more than the seeds explain; 81 seeds of each would" in near.text()
    page = page_of(comparison)
    assert "Seeds" in page and "not more than the seeds explain" in page and "± 0.052" in page


def test_losses_on_other_validation_data_are_not_tested_against_each_other(tmp_path):
    runs = write_seeds(tmp_path, LOW, 1) + write_seeds(tmp_path, HIGH, 2, data="aa11+other")
    comparison = comparison_of(*runs)
    (verdict,) = judge(comparison, find_repeats(comparison))
    assert verdict.metric == "train/loss" and verdict.p_value == 1
    assert find_repeats(comparison_of(runs[0])) == []


def test_a_seed_without_a_finite_value_is_named_and_its_settings_get_no_verdict(tmp_path):
    runs = write_seeds(tmp_path, [2.3, float("nan"), 2.4], 1) + write_seeds(tmp_path, [2.3, 2.5], 2)
    comparison = comparison_of(*runs)
    groups = find_repeats(comparison)
    assert judge(comparison, groups) == []
    assert ["optim.lr=1", "3", "val/loss", "no finite value in 1", "", ""] in table_of(groups).lines
