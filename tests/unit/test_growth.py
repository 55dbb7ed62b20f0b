"""Slow divergence, on numbers that runs wrote: fine-tunings of a small Qwen2 and a small Qwen3."""

from types import SimpleNamespace

import pytest

from qwlit.training.resilience.growth import GROWTH, SlowDivergence
from qwlit.training.resilience.probe import MAX_ATTENTION_LOGIT
from qwlit.training.step_gauges import ACTIVATION_NORM


def alarms(rule_state=None, *, is_pretrained=True, **numbers):
    """Read one record after the other; return the records, counted from 1, at which there was an alarm."""
    raised = []
    guard = SimpleNamespace(alarm=lambda step, reason, cause: raised.append((step, reason, cause)))
    rule = SlowDivergence(guard, is_pretrained=is_pretrained, vocab_size=8192)
    if rule_state:
        rule.load_state_dict(rule_state)
    names = {"activation": ACTIVATION_NORM, "attention": MAX_ATTENTION_LOGIT, "loss": "train/loss"}
    for step, values in enumerate(zip(*numbers.values(), strict=True), start=1):
        rule.read(step, {names[name]: value for name, value in zip(numbers, values, strict=True)})
    return [step for step, _, _ in raised], rule.state_dict(), raised


@pytest.mark.parametrize(
    "values",
    [
        [2.44, 2.91, 2.38, 3.19, 2.70, 2.73, 3.41, 2.85],  # Qwen3 at 1e-3
        [3.84, 3.79, 4.28, 3.75, 3.67, 3.32, 4.16, 4.69],  # Qwen2 at 1e-3
        [2.44, 9.0, 9.7, 9.5, 9.6],
        [2.44, 12.0, 2.5, 12.0, 2.6],  # one batch is an outlier
        [2.44, 12.0, None, float("nan"), 3.0],
    ],
)
def test_a_healthy_fine_tuning_is_no_alarm(values):
    assert alarms(activation=values)[0] == []


@pytest.mark.parametrize(
    ("values", "step"),
    [
        ([2.44, 4.28, 12.8, 14.2], 4),  # Qwen3 at 1e-2, every 5 steps
        ([3.84, 6.58, 10.1, 15.5, 17.1, 25.9], 5),  # Qwen2 at 1e-2
        ([2.44, 70.0, 668.0], 3),  # Qwen3 at 3e-2
    ],
)
def test_a_fine_tuning_that_blows_up_the_activations_is_an_alarm_at_the_second_record(values, step):
    found, _, (first, *_) = alarms(activation=values)
    assert found[0] == step
    assert ACTIVATION_NORM in first[1] and first[2] == "divergence"


def test_random_weights_from_a_folder_may_grow_as_random_weights_do():
    """Numbers like those of a run of benchmarks/train.py (0.126 to 0.864), and such a growth of pretrained weights."""
    grown = [0.121, 0.126, 0.31, 0.62, 0.86, 1.1]
    assert alarms(activation=grown, loss=[9.06, 9.02, 8.99, 8.91, 8.85, 8.8])[0] == []
    assert alarms(activation=grown, loss=[3.0, 2.9, 2.8, 2.8, 2.7, 2.6])[0] == [5, 6]


def test_attention_logits_are_an_alarm_only_where_the_softmax_is_saturated():
    assert alarms(attention=[2.0, 11.0, 16.0, 19.0, 49.0])[0] == []
    assert alarms(attention=[16.0, 22.0, 60.7, 72.1, 90.9])[0] == [5]


def test_a_model_from_random_weights_may_grow_but_not_without_limit():
    assert (
        alarms(is_pretrained=False, activation=[0.74, 1.99, 3.44, 2.77, 4.48], attention=[2.3, 4.2, 6.9, 18.7, 16])[0]
        == []
    )
    assert alarms(is_pretrained=False, attention=[26.0, 252, 542, 945, 1700, 2870])[0] == [6]


def test_a_resumed_run_remembers_its_first_value_and_how_many_records_were_too_large():
    _, state, _ = alarms(activation=[1.0, GROWTH + 1])
    assert alarms(state, activation=[GROWTH + 1])[0] == [1]
