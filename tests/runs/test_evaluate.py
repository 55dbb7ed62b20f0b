"""`evaluate`: its numbers are those of plain transformers on the same ids, and it tells models apart."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwlit.core.errors import ConfigError
from qwlit.inference.evaluate import Evaluation, _paired, compare
from qwlit.inference.sample_scores import SampleScores
from tests.runs.runs import qwlit, summary

GREEDY = ["generation.temperature=0", "generation.repetition_penalty=1", "generation.max_new_tokens=12"]


def evaluated(words, place) -> dict:
    done = qwlit(["evaluate", *words, "output=json"], place)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == json.loads((place / "evaluation/evaluation.json").read_text(encoding="utf-8"))
    return found


def plain_numbers(export, samples) -> dict:
    """Loss, accuracy and bits per byte by plain transformers, one sample at a time."""
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(export)
    losses, correct, num_bytes = [], [], 0
    for sample in samples:
        ids, mask = torch.tensor([sample["input_ids"]]), torch.tensor(sample["loss_mask"][1:], dtype=torch.bool)
        with torch.inference_mode():
            logits = model(ids).logits[0, :-1][mask]
        targets = ids[0, 1:][mask]
        losses.append(F.cross_entropy(logits, targets, reduction="none"))
        correct.append(logits.argmax(-1) == targets)
        num_bytes += len(tokenizer.decode(targets, skip_special_tokens=True).encode())
    loss_sum = torch.cat(losses).double().sum().item()
    tokens = sum(map(len, losses))
    accuracy = torch.cat(correct).double().mean().item()
    return {"loss": loss_sum / tokens, "accuracy": accuracy, "bits_per_byte": loss_sum / math.log(2) / num_bytes}


def test_the_numbers_are_those_of_plain_transformers_and_the_groups_add_up(trained):
    found = evaluated(["run=full", "data.path=asked.jsonl"], trained)["models"]["full"]["groups"]
    inspected = qwlit(["inspect", "model=demo", "data.path=asked.jsonl", "output=json"], trained)
    samples = [json.loads(line) for line in inspected.stdout.splitlines()]
    expected = plain_numbers(trained / "runs/full/export", samples)
    everything = found["all"]["all"]
    assert everything["samples"] == len(samples) == 8
    assert everything["tokens"] == sum(sample["num_supervised_tokens"] for sample in samples)
    for name, value in expected.items():
        assert everything[name] == pytest.approx(value, rel=1e-6), name
    assert everything["perplexity"] == pytest.approx(math.exp(expected["loss"]), rel=1e-5)
    scripts = found["script"].values()
    assert sum(script["samples"] for script in scripts) == 8
    mean = sum(script["loss"] * script["tokens"] for script in scripts) / everything["tokens"]
    assert mean == pytest.approx(everything["loss"], rel=1e-9)


def test_without_a_path_the_runs_validation_rows_are_measured_as_in_training(trained):
    found = evaluated(["run=full"], trained)["models"]["full"]["groups"]["all"]["all"]
    assert found["loss"] == pytest.approx(summary(trained / "runs/full")["val_loss_best"], rel=1e-5)


def test_a_runs_newest_evaluation_is_in_its_folder_and_those_of_other_weights_are_not(trained):
    file = trained / "runs/full/evaluation.json"
    file.unlink(missing_ok=True)
    best = (trained / "runs/full/checkpoints/best").resolve()
    evaluated([f"run={best}"], trained)
    evaluated(["run=runs/full/export", "data.path=asked.jsonl"], trained)
    assert not file.exists()
    found = evaluated(["run=full"], trained)["models"]["full"]
    assert json.loads(file.read_text()) == {"checkpoint": best.name, **found}
    file.unlink()
    file.mkdir()
    done = qwlit(["evaluate", "run=full"], trained)
    assert done.returncode == 0 and "`report` will not show this: " in done.stdout
    file.rmdir()


def test_models_are_compared_sample_by_sample(trained):
    both = ["run=[full,runs/lora/export,runs/full/export]", "data.path=asked.jsonl"]
    found = evaluated(both, trained)
    tuned, same, back = found["differences"]
    losses = {name: model["groups"]["all"]["all"]["loss"] for name, model in found["models"].items()}
    assert tuned["loss"] == pytest.approx(losses["runs/lora/export"] - losses["full"], rel=1e-6)
    assert tuned["low"] <= tuned["loss"] <= tuned["high"] and tuned["loss"] == pytest.approx(-back["loss"], rel=1e-4)
    assert same["loss"] == pytest.approx(0, abs=1e-6)


def scores(losses) -> SampleScores:
    ones = np.ones(len(losses), dtype=np.int64)
    return SampleScores(np.asarray(losses), ones, ones, ones, ["f"] * len(losses), ["Latin"] * len(losses))


def test_the_interval_of_a_paired_difference_covers_the_truth_and_the_test_keeps_its_level():
    """60 pairs of models whose true difference is 0.3 with noise of 1, and 60 without a difference, 60 samples each."""
    generator = np.random.default_rng(1)
    covered = false_alarms = 0
    for _ in range(60):
        first = generator.normal(2, 3, 60)
        _, low, high, _ = _paired(scores(first), scores(first + 0.3 + generator.normal(0, 1, 60)))
        covered += low <= 0.3 <= high
        false_alarms += _paired(scores(first), scores(first + generator.normal(0, 1, 60)))[3] < 0.05
    # 95 % and 5 % of 60, three standard deviations wide.
    assert covered >= 52 and false_alarms <= 8


def test_a_model_is_better_only_where_interval_and_test_agree():
    # Three samples of which each speaks for the first model: the interval has no zero, but p is at least 1/4.
    few = compare({"a": Evaluation({}, scores([1, 2, 3]), []), "b": Evaluation({}, scores([1.5, 2.4, 3.6]), [])})[0]
    assert few.low > 0 and few.describe().endswith("no clear difference")
    many = compare({"a": Evaluation({}, scores([1] * 20), []), "b": Evaluation({}, scores([1.5] * 20), [])})[0]
    assert many.describe().endswith("a is better")


def test_answers_are_scored_at_each_temperature_and_drawn(trained):
    words = ["run=full", "data.path=asked.jsonl", "metrics=[exact_match,rouge_l]", "prompts=4", *GREEDY]
    quality = evaluated([*words, "temperatures=[0,1.0]", "repeats=2", "modes=[thinking,non_thinking]"], trained)
    curves = quality["models"]["full"]["quality"]
    assert curves.keys() == {"thinking", "non_thinking"}
    assert [point["temperature"] for point in curves["thinking"]["rouge_l"]] == [0, 1]
    assert all(p["low"] <= p["score"] <= p["high"] for c in curves.values() for m in c.values() for p in m)
    assert (trained / "evaluation/temperature-full-rouge_l.png").stat().st_size > 10_000
    again = evaluated([*words, "temperatures=[0,1.0]", "repeats=2", "modes=[thinking,non_thinking]"], trained)
    assert again == quality


def test_rows_that_are_left_out_are_named(trained):
    rows = [{"prompt": "a", "completion": answer} for answer in ("b", "")] + [
        {"prompt": "a " * 5000, "completion": "b"}
    ]
    (trained / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = qwlit(["evaluate", "run=full", "data.path=some.jsonl"], trained)
    assert done.returncode == 0, done.stderr
    assert "left out: some.jsonl:2" in done.stdout and "1 rows are left out: more than" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run=full", "temperatures=default"], "such as metrics=exact_match"),
        (["run=full", "metrics=blue"], "Did you mean 'bleu'"),
        (["run=full", "metrics=bleu", "temperatures=[warm]"], "temperatures=[warm]: give numbers"),
        (["run=full", "metrics=bleu", "modes=thinkin"], "choose among non_thinking, thinking"),
        (["run=[full,full]"], "in the list twice"),
        (["run=full", "run=lora"], "run is typed twice"),
        (["run=full,lora"], "Several are written run=[full,lora]"),
        (["run=ful"], "Did you mean 'full'?"),
        (["run=full", "data.path=asked.jsonl", "metrics=operator:add", *GREEDY], "returns no number (ValueError"),
        (["model.path=runs/full/export"], "name rows with data.path=FILE"),
        (["run=nobody/checkpoints/step-000001"], "neither nobody nor runs/nobody"),
        (["run=full/checkpoints/step-000001"], "no such checkpoint; there are best, last, step-000008"),
        ([], "name a model"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(trained, words, said):
    done = qwlit(["evaluate", *words], trained)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_models_with_other_tokens_are_not_compared_by_their_loss_per_token():
    one, other = (Evaluation({}, scores([1.0]), contents) for contents in (["a"], ["b"]))
    with pytest.raises(ConfigError, match="first and second have other tokens for these rows"):
        compare({"first": one, "second": other})
