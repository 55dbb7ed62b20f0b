"""The guard's rules on series of losses and norms, and the journal of rollbacks."""

import dataclasses
import json

import numpy as np
import pytest

from qwlit.config.compose import compose
from qwlit.core.errors import ConfigError
from qwlit.data.step_plan import Limits, SkippedData, StepPlan
from qwlit.optim.config import SchedulerConfig
from qwlit.optim.schedules import LearningRateCut, Schedule
from qwlit.planning.steps import PlannedSteps
from qwlit.training.resilience.divergence import MAX_SKIPS, DivergenceRules, StepNumbers
from qwlit.training.resilience.rollback import Health, Rollback, journal_entry, read_journal, record_decision
from qwlit.training.tracking.run_folder import RunFolder


def numbers(step, loss=2.0, norm=1.0, **what):
    facts = {"skipped": False, "nonfinite": False, "spike": False} | what
    return StepNumbers(step, loss, norm, **facts)


def first_trouble(losses, norms=None):
    rules = DivergenceRules(3)
    for index, loss in enumerate(losses):
        trouble = rules.update(numbers(index + 1, float(loss), 1.0 if norms is None else float(norms[index])))
        if trouble:
            return index + 1, *trouble
    return None


def learning(steps, noise, seed=0):
    dice = np.random.default_rng(seed)
    return 1 + 4 * np.exp(-np.arange(steps) / 80) + noise * dice.standard_normal(steps)


@pytest.mark.parametrize("noise", [0.02, 0.2, 0.5])
@pytest.mark.parametrize("seed", range(5))
def test_a_run_that_learns_is_no_trouble_whatever_its_noise(noise, seed):
    assert first_trouble(learning(3000, noise, seed)) is None


def two_kinds(dice, share):
    return np.where(dice.random(1500) < share, 2.2, 0.7) + 0.1 * dice.standard_normal(1500)


@pytest.mark.parametrize(
    "losses",
    [
        lambda dice: 3 + dice.standard_normal(1500),
        lambda dice: 1.5 + 1.5 * np.exp(-np.arange(1500) / 200) + dice.standard_normal(1500),
        lambda dice: 0.5 * np.exp(1.5 * dice.standard_normal(1500)),
        lambda dice: two_kinds(dice, 0.1),
        lambda dice: two_kinds(dice, 0.4),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_steps_of_one_sample_are_no_trouble(losses, seed):
    assert first_trouble(losses(np.random.default_rng(seed))) is None


def test_a_run_that_diverges_before_there_is_a_smoothed_loss_is_trouble():
    step, reason, cause = first_trouble([0.6, 0.7, 0.6, *np.linspace(0.9, 1.6, 6), *np.full(90, 1.6)])
    assert step == 21 and cause == "divergence" and "the loss rose from 0.6 to 1.6" in reason


def test_a_run_that_diverges_in_its_second_step_and_becomes_better_is_said_to_end_above_its_start():
    rules = DivergenceRules(3)
    for index, loss in enumerate([6.3, *(12_000 * np.exp(-np.arange(48) / 20))]):
        assert rules.update(numbers(index + 1, float(loss))) is None
    assert "above its start at 6.3" in rules.trouble_at_end()[0]


@pytest.mark.parametrize("noise", [0.02, 0.2, 0.5])
def test_a_loss_that_rises_and_stays_is_trouble_within_forty_steps(noise):
    losses = learning(600, noise)
    losses[400:] += np.minimum(3.0, 0.3 * np.arange(200))
    step, reason, cause = first_trouble(losses)
    assert 400 < step < 440 and cause == "divergence" and "the loss rose from" in reason


def test_one_bad_step_and_a_short_bump_are_no_trouble():
    losses = learning(600, 0.05)
    losses[300] += 50
    losses[400:410] += 2
    assert first_trouble(losses) is None


def test_a_norm_that_stays_high_is_trouble_and_ten_high_steps_are_needed():
    norms = np.ones(200)
    norms[100:109] = 8
    assert first_trouble(np.full(200, 2.0), norms) is None
    norms[109:] = 8
    step, reason, cause = first_trouble(np.full(200, 2.0), norms)
    assert step == 110 and cause == "divergence" and "norm was 4 times its median" in reason


def test_skips_count_in_a_row_and_within_fifty_steps():
    rules = DivergenceRules(3)
    bad = {"skipped": True, "nonfinite": True}
    assert [rules.update(numbers(step, float("nan"), **bad)) for step in (1, 2)] == [None, None]
    reason, cause = rules.update(numbers(3, float("nan"), **bad))
    assert reason == "loss or gradient not finite 3 times in a row" and cause == "data"
    rules = DivergenceRules(9)
    spike = {"skipped": True, "spike": True}
    skips = {10, 40, 60, 89}
    found = [step for step in range(1, 90) if rules.update(numbers(step, **(spike if step in skips else {})))]
    assert found == [89]  # 40, 60 and 89; from 10 to 60 there are 51 steps


def test_a_number_of_steps_that_are_not_finite_which_changes_nothing_is_refused():
    assert compose(["model=demo", "data=demo", f"guard.max_nonfinite_steps={MAX_SKIPS}"])
    with pytest.raises(ConfigError, match="max_nonfinite_steps=4: input should be less than or equal to 3"):
        compose(["model=demo", "data=demo", f"guard.max_nonfinite_steps={MAX_SKIPS + 1}"])


def test_an_overflow_of_float16_is_no_bad_step():
    rules = DivergenceRules(3)
    assert not any(rules.update(numbers(step, 2.0, float("inf"), skipped=True)) for step in range(1, 20))


def test_a_run_that_ends_above_its_start_is_said():
    for end, is_trouble in ((1.9, False), (2.01, False), (2.1, True)):
        rules = DivergenceRules(3)
        for step in range(40):
            rules.update(numbers(step + 1, 2.0 + (end - 2.0) * (step > 25) + 0.01 * (step * 7 % 5 - 2)))
        assert (rules.trouble_at_end() is not None) is is_trouble


@pytest.mark.parametrize("loss", [2.0, float("nan")])
def test_a_run_of_which_every_step_was_skipped_is_trouble_at_its_end(loss):
    rules = DivergenceRules(3)
    for step in (1, 2):
        assert rules.update(numbers(step, loss, float("nan"), skipped=True, nonfinite=True)) is None
    assert rules.trouble_at_end() == ("every step was skipped, because loss or gradient was not finite", "data")
    rules.update(numbers(3))
    assert rules.trouble_at_end() is None


def test_the_rules_continue_from_a_checkpoint_as_if_there_had_been_none():
    losses, norms = learning(300, 0.2), np.exp(0.3 * np.random.default_rng(3).standard_normal(300))
    losses[200:] += 3
    whole = first_trouble(losses, norms)
    rules = DivergenceRules(3)
    for step in range(205):
        assert rules.update(numbers(step + 1, float(losses[step]), float(norms[step]))) is None
    again = DivergenceRules(3)
    again.load_state_dict(json.loads(json.dumps(rules.state_dict())))
    for step in range(205, 300):
        if trouble := again.update(numbers(step + 1, float(losses[step]), float(norms[step]))):
            assert (step + 1, *trouble) == whole
            return
    raise AssertionError


def test_a_checkpoint_is_stable_after_healthy_steps():
    health = Health(total_steps=5000)
    assert health.stable_steps == 100 and Health(300).stable_steps == 30 and Health(20).stable_steps == 10
    health.unhealthy.extend([150])
    assert not health.is_stable(100, 199) and not health.is_stable(100, 250) and not health.may_become_stable(100)
    assert health.is_stable(50, 149) is False and health.is_stable(49, 149)
    assert health.may_become_stable(150) and health.is_stable(150, 250)


def decision(**changes):
    return dataclasses.replace(Rollback(130, 100, "the loss rose", "divergence", 4), **changes)


def test_data_and_learning_rate_are_functions_of_step_and_decisions():
    assert decision().skipped_data == SkippedData(100, 30 + 50)
    assert decision(cause="data").skipped_data == SkippedData(100, 80)
    assert decision(cause="state").skipped_data == SkippedData(100, 0)
    assert decision().lr_cut == LearningRateCut(100, 0.5, 20)
    assert decision(cause="data").lr_cut.factor == decision(cause="state").lr_cut.factor == 1.0
    twice = (decision().lr_cut, decision(to_step=120).lr_cut)
    schedule = Schedule(SchedulerConfig(name="constant", warmup_steps=0), 300, twice)
    found = [schedule.lr_multiplier(step) for step in (99, 100, 119, 120, 139, 200)]
    assert found == pytest.approx([1.0, 0.5 / 20, 0.5, 0.25 / 20, 0.25, 0.25])


@pytest.mark.parametrize("cause", ["state", "data"])
@pytest.mark.parametrize("to_step", [100, 105])
def test_going_back_for_a_damaged_state_or_for_data_keeps_the_warmup_of_the_rollback_before(cause, to_step):
    plan = StepPlan(None, None, 8, 1, Limits(), packing=False)
    steps = PlannedSteps(plan, Schedule(SchedulerConfig(name="constant", warmup_steps=0), 300), None)
    first, second = decision(), decision(from_step=107, to_step=to_step, cause=cause)
    before, after = steps.after([first]), steps.after([first, second])
    rates = [[found.schedule.lr_multiplier(step) for step in range(130)] for found in (before, after)]
    assert rates[0] == rates[1]


def test_the_journal_is_that_of_the_checkpoint_and_the_decisions_to_go_back_to_it(tmp_path):
    folder, first, second = RunFolder(tmp_path), decision(), decision(from_step=190, to_step=150)
    record_decision(folder, [first], second)
    record_decision(folder, [first, second], decision(to_step=200, from_step=260))
    manifest = {"rollbacks": [journal_entry(first)]}
    assert read_journal(folder, 150, manifest) == (first, second)
    assert read_journal(folder, 160, manifest | {"rollbacks": [journal_entry(first), journal_entry(second)]}) == (
        first,
        second,
    )
    assert read_journal(folder, 100, {}) == ()


def test_a_run_that_goes_back_further_than_before_keeps_the_decision_before(tmp_path):
    folder, first, further = RunFolder(tmp_path), decision(to_step=100), decision(from_step=105, to_step=50)
    record_decision(folder, [], first)
    record_decision(folder, [first], further)
    folder.drop_records_after(50)
    assert read_journal(folder, 50, {}) == (first, further)


def test_two_equal_decisions_are_two_and_a_decision_that_is_reached_again_after_a_kill_is_one(tmp_path):
    folder = RunFolder(tmp_path)
    for before in ([], [decision()], [decision()]):
        record_decision(folder, before, decision())
    assert read_journal(folder, 100, {}) == (decision(), decision())


@pytest.mark.parametrize(
    "entry",
    [
        None,
        {},
        {"from_step": 1, "to_step": 5, "reason": "", "cause": "data", "skipped_steps": 0},
        {"from_step": 9, "to_step": 5, "reason": "", "cause": "x", "skipped_steps": 0},
        {"from_step": "9", "to_step": 5, "reason": "", "cause": "data", "skipped_steps": 0},
    ],
)
def test_a_journal_that_is_not_ours_ends_in_one_line(entry, tmp_path):
    RunFolder(tmp_path).append_event(0, "rollback", decision=entry)
    with pytest.raises(ConfigError, match="a rollback cannot be read"):
        read_journal(RunFolder(tmp_path), 0, {})
