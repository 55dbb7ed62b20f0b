"""The diagnosis of a run: planted symptoms are named, healthy runs have none, and each remedy can be typed."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qwlit.commands.report import main
from qwlit.config.compose import compose, dump
from qwlit.report.diagnosis import OF_SAMPLING, diagnose
from qwlit.report.find import find_runs
from qwlit.report.runs import read_runs
from qwlit.training.resilience import probe
from tests.reports import assert_self_contained, comparison_of, page_of, write_run

BASE = ["model.hub_id=Qwen/Qwen3-0.6B", "data=demo"]
SETTINGS = {
    "full": [*BASE, "recipe=full_sft"],
    "strong": [*BASE, "recipe=full_sft", "optim.weight_decay=0.1", "dropout=pretrain", "train.max_grad_norm=null"],
    "lora": [*BASE, "recipe=lora", "hardware.micro_batch_size=4"],
    "frozen": [*BASE, "recipe=freeze", "train.max_grad_norm=5", "hardware.micro_batch_tokens=4096"],
    "random": ["experiment=demo", "scheduler=exponential", "validation.early_stopping_patience=4"],
}
NAMES = {
    "healthy": set(),
    "diverging": {"diverging loss"},
    "not finite": {"diverging loss"},
    "oscillating": {"unstable loss"},
    "jumping norms": {"unstable loss"},
    "overfitting": {"overfitting"},
    "slow": {"slow convergence"},
    "memory": {"near the memory limit"},
}


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    """Runs as read from folders whose config.yaml is that of the settings."""
    root = tmp_path_factory.mktemp("templates")
    for name, words in SETTINGS.items():
        write_run(root / name, manifest={"device_memory_gib": 40.0, "activation_checkpointing": "none"})
        (root / name / "config.yaml").write_text(dump(compose([*words, f"run.name={name}"]).config), encoding="utf-8")
    return {run.name: run for run in read_runs(find_runs([str(root / name) for name in SETTINGS]))}


def planted(templates, kind, seed):
    """A run with the symptom: 20 to 3,000 records with noise like that of steps of 16 to 64 samples."""
    draw = np.random.default_rng(seed)
    # Waves of less than eight records pass for noise.
    lengths = [30, 60, 120, 400, 3000] if kind == "oscillating" else [20, 30, 60, 120, 400, 3000]
    records, every = int(draw.choice(lengths)), int(draw.choice([1, 10, 50]))
    name = str(draw.choice(list(SETTINGS)))
    part = (np.arange(records) + 1) / records
    start = draw.uniform(3, 8) if name == "random" else draw.uniform(0.6, 5)
    fall = draw.uniform(0.5, 0.9) if name == "random" else draw.uniform(0.02, 0.7)
    schedule = np.minimum(1, 10 * part) * (1 - part)
    moved, level = draw.uniform(0.02, 2), start * (1 - fall * (1 - np.exp(-draw.uniform(2, 8) * part)))
    val, peak = level * draw.uniform(0.9, 1.15), draw.uniform(5, 34)
    norm_scale, shift = draw.uniform(0.05, 0.15), np.zeros(records)
    if kind == "diverging":
        shift = np.clip((part - draw.uniform(0.2, 0.6)) * 20, 0, 1) * (start + draw.uniform(0.5, 5))
    elif kind == "oscillating":
        waves = 1 - np.cos(2 * math.pi * part * draw.integers(3, max(3, min(8, records // 8)) + 1))
        shift = (0.3 + draw.uniform(0.2, 0.4) * level) * waves
    elif kind == "jumping norms":
        norm_scale = draw.uniform(0.6, 1.2)
    elif kind == "overfitting":
        best = draw.uniform(0.2, 0.6)
        val = level[int(best * records)] * (1.1 + draw.uniform(0.2, 2) * (part - best) ** 2 / (1 - best) ** 2)
        level = level * (1 - 0.5 * part)
    elif kind == "slow":
        level = val = start * (1 - draw.uniform(0, 0.05) * part)
        moved = draw.uniform(1e-5, 2e-3)
    elif kind == "memory":
        peak = draw.uniform(37, 40)
    noise = draw.standard_t(4, records) * draw.uniform(0.005, 0.04)
    losses, steps = (level + shift) * (1 + noise), [int(n * every) for n in range(1, records + 1)]
    norms = np.exp(draw.standard_normal(records) * norm_scale) * draw.uniform(0.2, 3) * (1 + np.exp(-9 * part))
    ratios = moved / every * schedule / schedule.sum()
    series = {
        "train/loss": list(zip(steps, losses.tolist(), strict=True)),
        "optim/grad_norm": list(zip(steps, norms.tolist(), strict=True)),
        "optim/lr": list(zip(steps, schedule.tolist(), strict=True)),
        "optim/update_ratio/decay": list(zip(steps, ratios.tolist(), strict=True)),
    }
    if kind == "overfitting" or draw.random() < 0.8:
        due = range(records // 8, records, max(1, records // int(draw.integers(5, 30))))
        series["val/loss"] = [
            (steps[n], float((val + shift)[n] * (1 + draw.normal(0, 0.003)))) for n in [*due, records - 1]
        ]
    if kind == "not finite":
        series["train/loss"] = series["train/loss"][: int(records * draw.uniform(0.3, 0.9))]
    run = templates[name]
    events = ({"step": 0, "event": "resumed"}, {"step": every, "event": "skip", "reason": "float16 overflow; halved"})
    results = replace(run.results, steps=steps[-1], peak_memory_gib=peak)
    return replace(run, series=series, events=events, results=results)


@pytest.fixture
def all_remedies(monkeypatch):
    """Remedies are not composed before they are returned: that takes 50 ms for each."""
    monkeypatch.setattr("qwlit.config.remedies._composes", lambda file, text: True)


@pytest.mark.parametrize("kind", NAMES)
def test_planted_runs_are_named_rightly_and_nothing_else(templates, all_remedies, kind):
    runs = {seed: planted(templates, kind, seed) for seed in range(100)}
    named = {seed: {symptom.name for symptom in diagnose(run).symptoms} for seed, run in runs.items()}
    assert {seed: names for seed, names in named.items() if names != NAMES[kind]} == {}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_remedy_can_be_typed_after_the_runs_own_config_and_changes_it(templates, all_remedies, name):
    remedies = set()
    for kind in NAMES:
        for seed in range(6):
            run = replace(planted(templates, kind, seed), settings=templates[name].settings)
            remedies |= {remedy for symptom in diagnose(run).symptoms for remedy in symptom.remedies}
    failed = {"step": 7, "event": "out_of_memory", "message": "out of memory in step 8"}
    broken = replace(templates[name], series={}, events=(failed,), manifest={"precision": "32-true", "has_bf16": True})
    (symptom,) = diagnose(broken).symptoms
    assert (symptom.name, symptom.evidence) == ("out of memory", ["step 8: out of memory in step 8"])
    remedies |= set(symptom.remedies)
    assert len(remedies) > 8 and "hardware.precision=bf16-mixed" in remedies
    file = templates[name].path / "config.yaml"
    before = compose([f"config={file}"]).config
    for remedy in remedies:
        assert compose([f"config={file}", *remedy.split()]).config != before, remedy


@pytest.mark.parametrize(
    ("reason", "cause", "name"),
    [
        ("the loss rose from 1 to 3 and stayed there for 12 steps", "divergence", "diverging loss"),
        ("3 of the last 3 steps were skipped", "data", "diverging loss"),
        (f"{OF_SAMPLING[0]}, as in 'aaa'", "divergence", "degenerate sampling"),
        ("layers.0.weight is not finite", "state", "damaged state"),
    ],
)
def test_decisions_of_the_guard_are_symptoms_by_their_cause(templates, reason, cause, name):
    back = {"step": 3, "event": "rollback", "reason": reason, "decision": {"cause": cause, "from_step": 9}}
    (symptom,) = diagnose(replace(templates["full"], series={}, events=(back,))).symptoms
    assert symptom.name == name and symptom.evidence == [f"{reason}: went back to step 3"]
    assert bool(symptom.remedies) == (name != "damaged state")


def test_a_run_that_stops_because_its_state_is_damaged_again_needs_other_hardware(templates):
    back = {"step": 3, "event": "rollback", "reason": "w is not finite", "decision": {"cause": "state"}}
    stop = {"step": 9, "event": "stopped", "reason": "w is not finite", "cause": "state"}
    (symptom,) = diagnose(replace(templates["full"], series={}, events=(back, stop))).symptoms
    assert symptom.name == "damaged state"
    (symptom,) = diagnose(replace(templates["full"], series={}, events=(stop,))).symptoms
    assert symptom.name == "damaged state"
    stop |= {"reason": "the loss rose", "cause": "divergence"}
    (symptom,) = diagnose(replace(templates["full"], series={}, events=(stop,))).symptoms
    assert symptom.name == "diverging loss"


def test_a_remedy_is_below_the_learning_rate_that_rollbacks_left(templates):
    cut, kept = ({"cause": cause, "from_step": 9} for cause in ("divergence", "data"))
    back = {"step": 3, "event": "rollback", "reason": "the loss rose", "decision": cut, "before": [cut, kept, cut]}
    run = replace(templates["full"], settings=templates["full"].settings | {"optim.lr": 4e-5}, series={})
    for event, lr in ((back, "5e-07"), (back | {"before": None}, "2e-06")):
        (symptom,) = diagnose(replace(run, events=(event,))).symptoms
        assert symptom.remedies[0].startswith(f"optim.lr={lr} ")


def test_the_beginnings_of_the_probes_alarms_are_those_in_its_source():
    source = Path(probe.__file__).read_text(encoding="utf-8")
    assert all(f'"{beginning}' in source for beginning in OF_SAMPLING)


def test_what_the_runs_own_config_does_not_take_is_no_remedy(templates, tmp_path):
    settings = dump(compose(SETTINGS["full"]).config)
    newer, older = tmp_path / "newer", tmp_path / "older"
    for folder, text in ((newer, settings), (older, settings + "unknown: 1\n")):
        folder.mkdir()
        (folder / "config.yaml").write_text(text, encoding="utf-8")
    event = {"step": 7, "event": "out_of_memory", "message": "out of memory in step 8"}
    run = replace(templates["full"], series={}, events=(event,))
    assert diagnose(replace(run, path=newer)).symptoms[0].remedies
    (symptom,) = diagnose(replace(run, path=older)).symptoms
    assert symptom.evidence and symptom.remedies == []


def test_the_gradients_of_a_run_that_has_learned_its_data_may_jump(templates):
    run, draw = planted(templates, "healthy", 3), np.random.default_rng(0)
    steps = range(1, 401)
    losses = [(step, max(0.05, 3 * 0.98**step)) for step in steps]
    norms = [(step, math.exp(draw.normal() * (0.1 if loss > 0.1 else 0.5))) for step, loss in losses]
    series = {"train/loss": losses, "optim/grad_norm": norms}
    assert diagnose(replace(run, series=series)).symptoms == []
    series["train/loss"] = [(step, loss + 0.2) for step, loss in losses]
    assert [symptom.name for symptom in diagnose(replace(run, series=series)).symptoms] == ["unstable loss"]


def test_a_few_skips_are_healthy_and_many_are_not(templates):
    run = planted(templates, "healthy", 0)
    skips = tuple({"step": step, "event": "skip", "reason": "loss or gradient not finite"} for step in range(1, 12))
    run = replace(run, results=replace(run.results, steps=1000))
    assert not diagnose(replace(run, events=skips[:4])).symptoms
    (symptom,) = diagnose(replace(run, events=skips)).symptoms
    assert symptom.evidence == ["11 steps were skipped, from step 1 on"]


def test_a_run_with_too_few_or_damaged_records_has_no_symptom_and_says_what_was_missing(tmp_path):
    path = write_run(tmp_path / "short", rows=[{"step": n, "train/loss": 10.0**n, "optim/lr": 1.0} for n in range(12)])
    for text in (None, "{broken\n[1]\n\n", ""):
        if text is not None:
            (path / "metrics.jsonl").write_text(text)
            (path / "events.jsonl").write_text('{"event": "rollback", "step": "x"}\n{"event": 5}\n')
            (path / "config.yaml").write_text("optim: [")
            (path / "manifest.json").write_text("no")
        (run,) = comparison_of(path).runs
        found = diagnose(run)
        assert found.symptoms == [] and "records of train/loss (too few, less than 20)" in found.looked_at


def test_terminal_page_and_json_say_the_same(tmp_path, capsys):
    rows = [
        {"step": n, "train/loss": 3 * 0.9**n, "val/loss": 1 + (n - 10) ** 2 / 100, "optim/lr": 1} for n in range(30)
    ]
    path = write_run(tmp_path / "<b>", rows=rows)
    (path / "config.yaml").write_text(dump(compose([*SETTINGS["full"], "run.name=b"]).config), encoding="utf-8")
    page = assert_self_contained(page_of(comparison_of(path)))
    main([f"runs={path}"])
    text = capsys.readouterr().out
    main([f"runs={path}", "output=json"])
    (said,) = json.loads(capsys.readouterr().out)["runs"]
    (symptom,) = said["diagnosis"]["symptoms"]
    assert symptom["name"] == "overfitting" and "train.max_steps=10" in symptom["remedies"]
    for line in (*symptom["evidence"], *symptom["remedies"], symptom["advice"]):
        assert line in page.text and line in text
    write_run(tmp_path / "healthy")
    main([f"runs={tmp_path}/*"])
    text = capsys.readouterr().out
    assert "diagnosis of <b>" in text and "diagnosis of healthy" not in text
