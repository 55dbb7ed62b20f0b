"""Local sweeps from the command line: every trial a real training in a process of its own.

QWLIT_LONG=1 kills more often, in a sweep of twenty trials.
"""

import contextlib
import itertools
import json
import os
import random
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from qwlit.config.compose import compose
from tests.long import LONG
from tests.runs.runs import ENVIRONMENT, TINY, losses, qwlit, qwlit_process, rows, summary, warm_command

TRIALS, KILLS = (20, 6) if LONG else (6, 3)
STEPS = 4
WORDS = [
    *TINY,
    "recipe=pretrain",
    "dropout=none",
    "data.path=chat.jsonl",
    "data.val_fraction=0.25",
    f"train.max_steps={STEPS}",
    "train.global_batch_size=4",
    "validation.every_steps=1",
    "validation.early_stopping_patience=null",
    "checkpoint.every_steps=1",
]


def write_sweep(folder, **entries) -> str:
    document = {
        "method": "random",
        "metric": {"name": "val/loss", "goal": "minimize"},
        "parameters": {"optim.lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}},
        "command": ["${env}", "${interpreter}", "-m", "qwlit", "train", *WORDS, "logger=wandb", "${args_no_hyphens}"],
    } | entries
    (folder / "search.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    return "sweep=search.yaml"


def record_of(folder) -> dict:
    return json.loads((folder / "sweep.json").read_text("utf-8"))


def finished_in_journal(folder) -> list[int]:
    """Trials by their entries in Optuna's journal that end one (operation 6 with a final state)."""
    entries = [json.loads(line) for line in (folder / "journal.log").read_text().splitlines()]
    return [e["trial_id"] for e in entries if e["op_code"] == 6 and e["state"] in (1, 2, 3)]


def processes_of(folder) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and str(folder).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def test_trials_two_at_a_time_lose_nothing_when_parent_and_children_are_killed(place):
    words = ["sweep", write_sweep(place), "backend=optuna", f"trials={TRIALS}", "jobs=2", "run.root=runs"]
    folder = place / "runs" / "search"
    dice = random.Random(0)
    kills, parents = 0, 0
    while True:
        parents += 1
        with (place / "said.log").open("ab") as said:
            parent = subprocess.Popen(warm_command(words), cwd=place, env=ENVIRONMENT, stdout=said, stderr=said)
        while parent.poll() is None:
            time.sleep(dice.uniform(0.3, 1.2))
            if kills == KILLS or parent.poll() is not None:
                parent.wait(timeout=400)
                break
            children = [pid for pid in processes_of("runs/search") if pid != parent.pid]
            victim = parent.pid if not children or kills % 2 == 0 else dice.choice(children)
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
                kills += 1
        if parent.wait() == 0:
            break
        assert parent.returncode == -signal.SIGKILL, (place / "said.log").read_text()
    assert kills == KILLS
    assert parents > 2
    record = record_of(folder)
    assert [trial["number"] for trial in record["trials"]] == list(range(TRIALS))
    assert {trial["state"] for trial in record["trials"]} == {"done"}
    assert sorted(finished_in_journal(folder)) == list(range(TRIALS))
    for trial in record["trials"]:
        run = folder / trial["run"]
        assert [step for step, _ in losses(run)] == list(range(1, STEPS + 1))
        measured = [row["val/loss"] for row in rows(run) if "val/loss" in row]
        assert len(measured) == STEPS
        assert trial["value"] == min(measured)
        assert f"lr: {trial['params']['optim.lr']}" in (run / "config.yaml").read_text()
        assert not (run / "wandb").exists()
    assert record["best"] == min(record["trials"], key=lambda trial: trial["value"])["number"]
    # A child of a killed parent may still be ending.
    deadline = time.monotonic() + 20
    while processes_of("runs/search") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_of("runs/search") == []


def test_bad_trials_are_recorded_with_their_reason_and_pruned_ones_are_shorter(place):
    lrs = {"optim.lr": {"values": [3e-3, 1e9, 1e-7, 1e-6]}, "model.attention": {"values": ["sdpa", "varlen"]}}
    rule = {"type": "hyperband", "min_iter": 1, "eta": 2}
    sweep = write_sweep(place, method="grid", parameters=lrs, early_terminate=rule)
    # Long enough that a pruned one is still on its way when it is told.
    words = ["sweep", sweep, "backend=optuna", "run.name=mixed", "train.max_steps=60", "validation.every_steps=3"]
    words += ["checkpoint.every_steps=null"]
    done = qwlit_process(words, place)
    assert done.returncode == 0, done.stderr
    folder = place / "runs" / "mixed"
    trials = {(t["params"]["model.attention"], t["params"]["optim.lr"]): t for t in record_of(folder)["trials"]}
    assert len(trials) == 8
    for lr in (3e-3, 1e9, 1e-7, 1e-6):
        assert trials["varlen", lr]["state"] == "failed"
        assert "model.attention=varlen" in trials["varlen", lr]["reason"]
    assert trials["sdpa", 3e-3]["state"] == "done"
    assert trials["sdpa", 1e9]["state"] in ("diverged", "pruned")
    pruned_trials = [json.loads(line) for line in (folder / "journal.log").read_text().splitlines()]
    pruned_trials = {entry["trial_id"] for entry in pruned_trials if "pruned_at" in entry.get("user_attr", {})}
    assert pruned_trials == {t["number"] for t in trials.values() if t["state"] == "pruned"}
    assert pruned_trials, "of three learning rates one learns nothing"
    for trial in trials.values():
        if trial["state"] == "pruned":
            run = folder / trial["run"]
            assert summary(run)["status"] == "pruned"
            assert losses(run)[-1][0] < 60
            assert "not among the best" in trial["reason"]
    assert "4 failed" in done.stdout


def test_the_best_trial_trains_again_from_its_file(place):
    done = qwlit_process(["sweep", write_sweep(place), "backend=optuna", "trials=2", "jobs=2"], place)
    assert done.returncode == 0, done.stderr
    assert "2 trials, 2 done" in done.stdout
    best = qwlit(["sweep", "sweep=search.yaml", "action=best"], place)
    assert best.returncode == 0, best.stderr
    record = record_of(place / "runs" / "search")
    assert f"optim.lr={record['trials'][record['best']]['params']['optim.lr']}" in best.stdout
    hint = next(line for line in best.stderr.splitlines() if "qwlit train" in line)
    words = shlex.split(hint.split("qwlit train ")[1].replace("run.name=…", "run.name=again"))
    assert qwlit(["train", *words], place).returncode == 0
    again = summary(place / "runs" / "again")
    assert again["val_loss_best"] == record["trials"][record["best"]]["value"]
    # The same file with other settings is another sweep, and the folder is taken.
    other = qwlit(["sweep", "sweep=search.yaml", "backend=optuna", "trials=2", "seed=5"], place)
    assert other.returncode == 2
    assert "seed was 0, now 5" in other.stderr
    more = qwlit_process(["sweep", "sweep=search.yaml", "backend=optuna", "trials=3"], place)
    assert more.returncode == 0
    assert len(record_of(place / "runs" / "search")["trials"]) == 3
    # Trials of W&B's agents are such a folder without a record of ours.
    now = qwlit(["sweep", "sweep=search.yaml", "action=best"], place).stdout
    (place / "runs" / "search" / "sweep.json").unlink()
    assert qwlit(["sweep", "sweep=search.yaml", "action=best"], place).stdout == now


def test_two_machines_share_one_sweep(place):
    words = ["sweep", write_sweep(place), "backend=optuna", "trials=5"]
    both = [subprocess.Popen(warm_command(words), cwd=place, env=ENVIRONMENT, stdout=subprocess.PIPE) for _ in range(2)]
    assert [process.wait(timeout=240) for process in both] == [0, 0]
    said = [process.stdout.read().decode() for process in both]
    trials = record_of(place / "runs" / "search")["trials"]
    assert [trial["number"] for trial in trials] == list(range(5))
    begun = [line for text in said for line in text.splitlines() if "begins" in line]
    assert len(begun) == 5
    assert all("begins" in text for text in said)
    assert sorted(finished_in_journal(place / "runs" / "search")) == list(range(5))


def test_ctrl_c_saves_the_trials_and_the_same_command_goes_on(place):
    words = ["sweep", write_sweep(place), "backend=optuna", "trials=1", "train.max_steps=400"]
    parent = subprocess.Popen(warm_command(words), cwd=place, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    run = place / "runs" / "search" / "trial-0000"
    while not (run / "metrics.jsonl").exists() or len(losses(run)) < 5:
        time.sleep(0.05)
    parent.send_signal(signal.SIGINT)
    said, _ = parent.communicate(timeout=60)
    assert parent.returncode == 130
    assert "the same command resumes the sweep" in said
    assert summary(run)["status"] == "preempted"
    assert record_of(run.parent)["trials"][0]["state"] == "running"
    reached = summary(run)["steps"]
    assert 5 <= reached < 400
    again = subprocess.Popen(warm_command(words), cwd=place, env=ENVIRONMENT, stdout=subprocess.PIPE)
    while losses(run)[-1][0] <= reached + 2 or summary(run).get("resumed_from") != reached:
        assert again.poll() is None
        time.sleep(0.05)
    again.send_signal(signal.SIGTERM)
    assert again.wait(timeout=60) == 75


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sweep=search.yaml", "backend=optuna"], "trials is not set"),
        (["sweep=search.yaml", "backend=optuna", "trials=0"], "trials=0: give a whole number of at least 1"),
        (["sweep=search.yaml", "backend=optuna", "trials=2", "agents=2"], "set jobs=N"),
        (["sweep=search.yaml", "backend=wandb", "jobs=2"], "set agents=N"),
        (["sweep=search.yaml", "backend=ray"], "choose one of wandb, optuna"),
        (["sweep=lorra", "backend=optuna"], "Did you mean 'lora'"),
        (["backend=optuna"], "sweep is not set"),
        (["action=find_lr", "trials=3"], "has no effect with action=find_lr"),
        (["action=repeat", *WORDS, "repeats=1"], "repeats=1: give a whole number of at least 2"),
        (["action=repeat", *WORDS, "jobs=2"], "has no effect with action=repeat"),
        (["action=pilot", *WORDS, "train.max_steps=5"], "needs at least 20 steps"),
        (["action=pilot", *WORDS, "scheduler.warmup_ratio=0.1"], "schedule of its own"),
        (["action=find_lr", *WORDS, "train.max_steps=5"], "needs at least 20 steps"),
        (["action=find_lr", *WORDS, "scheduler.warmup_ratio=0.1"], "schedule of its own"),
        (["sweep=search.yaml", "backend=optuna", "trials=2", "optim.lr=0.5"], "is a parameter of the sweep"),
        (["sweep=search.yaml", "backend=optuna", "trials=2", "data.val_fraction=0.0"], "set data.val_path or"),
        (
            ["sweep=search.yaml", "backend=optuna", "trials=2", "validation={every_steps: null, each_epoch: false}"],
            "set validation.each_epoch=true or every_steps",
        ),
        (["sweep=search.yaml", "backend=optuna", "trials=2", "optim.lrr=1"], "Did you mean 'optim.lr'"),
        (["sweep=search.yaml", "action=best"], "holds no sweep"),
        (["sweep=search.yaml", "backend=optuna", "trials=2", "run.name=taken"], "holds no sweep; move it away"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_started(place, words, said):
    write_sweep(place)
    (place / "runs" / "taken").mkdir(parents=True)
    (place / "runs" / "taken" / "mine.txt").write_text("x")
    done = qwlit(["sweep", *words], place)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(place.glob("runs/*/trial*"))


def test_a_sweep_whose_trials_cannot_begin_is_stopped(place):
    done = qwlit_process(
        ["sweep", write_sweep(place), "backend=optuna", "trials=9", "data.path=none.jsonl", "jobs=2"], place
    )
    assert done.returncode == 2
    assert "could not begin, the sweep is stopped" in done.stderr
    assert "none.jsonl" in done.stderr
    assert len(record_of(place / "runs" / "search")["trials"]) <= 4


def test_the_range_test_finds_a_rate_at_which_the_demo_learns(place):
    words = [*TINY, "recipe=pretrain", "dropout=none", "data.path=chat.jsonl", "optim.lr=1.0", "train.max_steps=60"]
    done = qwlit_process(["sweep", "action=find_lr", *words], place)
    assert done.returncode == 0, done.stderr
    (run,) = (place / "runs").glob("*-lr")
    found = json.loads((run / "lr_range.json").read_text())
    assert 1e-5 < found["suggestion"] < 0.1
    assert f"optim.lr={found['suggestion']:.1e}" in done.stdout
    assert (run / "lr_range.png").stat().st_size > 5000
    rates = found["lr"]
    ratio = rates[1] / rates[0]
    assert all(abs(b / a / ratio - 1) < 1e-6 for a, b in itertools.pairwise(rates))
    config = compose([f"config={run / 'config.yaml'}"]).config
    assert config.scheduler.name == "range_test"
    assert not (run / "checkpoints").exists()
    failed = qwlit_process(["sweep", "action=find_lr", *words, "data.path=none.jsonl"], place)
    assert failed.returncode == 2
    assert "none.jsonl" in failed.stderr
    taken = place / "runs" / "mine-lr"
    taken.mkdir()
    (taken / "config.yaml").write_text("a run of somebody's")
    refused = qwlit(["sweep", "action=find_lr", *words, "run.name=mine"], place)
    assert refused.returncode == 2
    assert "is not a range test" in refused.stderr
    assert (taken / "config.yaml").exists()


def test_repeats_are_runs_of_their_own_that_the_same_command_passes_over(place):
    words = ["sweep", "action=repeat", "repeats=2", *WORDS, "seed=4", "run.name=again"]
    done = qwlit(words, place)
    assert done.returncode == 0 and "val/loss" in done.stdout, done.stderr
    runs = [place / "runs" / f"again-seed{seed}" for seed in (4, 5)]
    values = [summary(run)["val_loss_best"] for run in runs]
    assert values[0] != values[1] and f"{sum(values) / 2:.5g}" in done.stdout
    before = [(run / "metrics.jsonl").stat().st_mtime_ns for run in runs]
    assert qwlit(words, place).returncode == 0
    assert before == [(run / "metrics.jsonl").stat().st_mtime_ns for run in runs]
    wrong = qwlit([*words, "optim.lr=7e-4"], place)
    assert wrong.returncode == 2 and "again-seed4 is finished and has other settings, optim.lr;" in wrong.stderr
    assert qwlit([*words, "optim.lr=7e-4", "run.overwrite=true"], place).returncode == 0
    assert values != [summary(run)["val_loss_best"] for run in runs]
    assert qwlit([*words, "optim.lr=7e-4", "resume=never"], place).returncode == 0


def test_the_pilot_says_which_learning_rates_are_stable_and_trains_nothing_else(place):
    words = [*TINY, "recipe=pretrain", "dropout=none", "data.path=chat.jsonl", "run.name=p", "train.max_steps=40"]
    done = qwlit_process(["sweep", "action=pilot", *words, "optim.lr=0.3"], place)
    assert done.returncode == 0, done.stderr
    folder = place / "runs" / "p-pilot"
    found = json.loads((folder / "pilot.json").read_text())
    assert [run["lr"] for run in found["runs"]] == pytest.approx([0.1, 0.3, 0.9])
    assert found["runs"][0]["reason"] is None and found["runs"][2]["reason"]
    stable = [run["lr"] for run in found["runs"] if run["reason"] is None]
    assert found["suggestion"] == pytest.approx(max(stable) / 3, rel=0.05)
    assert f"optim.lr={found['suggestion']:g} scheduler.warmup_ratio=0.1" in done.stdout
    assert (folder / "pilot.png").stat().st_size > 5000
    assert [summary(run)["rollbacks"] for run in sorted(folder.glob("lr-*")) if run.is_dir()] == [0, 0, 0]
    again = qwlit_process(["sweep", "action=pilot", *words, "optim.lr=1e12"], place)
    assert again.returncode == 0 and "no suggestion: not even 3.3e+11 is stable" in again.stdout
    (folder / "mine.txt").write_text("x")
    refused = qwlit(["sweep", "action=pilot", *words], place)
    assert refused.returncode == 2 and "is not a pilot" in refused.stderr, refused.stderr
    assert (folder / "mine.txt").exists()
