"""Numeric faults, alone and on two ranks: the run ends as one without the fault does, and no fault reaches a weight.

`QWLIT_LONG=1 pytest tests/faults/test_guard.py` plants every kind with every seed and strategy, 336 runs, and kills 30
times; else it does a sample of both.
"""

import json
import random
import shutil
import subprocess
import time
from pathlib import Path

import lightning.pytorch as lightning
import pytest
import torch

import qwlit
from tests.long import LONG
from tests.runs.runs import (
    ENVIRONMENT,
    TINY,
    WarmProcess,
    assert_same_run,
    interpreter,
    qwlit_process,
    rows,
    steps_logged,
    summary,
    warm_command,
    weights,
)

STRATEGIES = {
    "alone": [],
    "ddp": ["hardware.devices=2", "hardware.strategy=ddp"],
    "fsdp": ["hardware.devices=2", "hardware.strategy=fsdp"],
}
RUN = [
    *TINY,
    *("data=demo", "data.exact_match=0", "train.global_batch_size=8", "train.max_steps=60"),
    *("train.max_epochs=null", "optim.lr=3e-3", "scheduler.warmup_steps=5", "checkpoint.every_steps=10"),
    *("checkpoint.each_epoch=false", "validation.each_epoch=false", "validation.every_steps=60"),
]
NAN, INF = "nan", "inf"


def steps(*numbers: int) -> list[int]:
    return [*numbers]


KINDS = {
    "NaN loss": [{"kind": "loss", "steps": steps(30), "value": NAN}],
    "+Inf loss": [{"kind": "loss", "steps": steps(30), "value": INF}],
    "-Inf loss on one rank": [{"kind": "loss", "steps": steps(30), "value": "-inf", "rank": 0}],
    "NaN gradient on one rank": [{"kind": "gradient", "steps": steps(30), "value": NAN, "rank": 0}],
    "NaN on one rank after the exchange": [{"kind": "norm", "steps": steps(30), "value": NAN, "rank": 0}],
    "norm x 10": [{"kind": "scale", "steps": steps(30), "value": 10}],
    "norm x 30": [{"kind": "scale", "steps": steps(30), "value": 30}],
    "norm x 100": [{"kind": "scale", "steps": steps(30), "value": 100}],
    "burst of 20": [{"kind": "scale", "steps": steps(*range(30, 50)), "value": 100}],
    "2 of every 3": [{"kind": "loss", "steps": [s for s in range(20, 44) if s % 3], "value": NAN}],
    "NaN parameter": [{"kind": "parameter", "steps": steps(33), "value": NAN}],
    "Inf parameter": [{"kind": "parameter", "steps": steps(33), "value": INF}],
    "1e20 parameter": [{"kind": "parameter", "steps": steps(33), "value": 1e20}],
    "NaN moment": [{"kind": "exp_avg", "steps": steps(33), "value": NAN}],
    "Inf moment": [{"kind": "exp_avg_sq", "steps": steps(33), "value": INF}],
    "negative moment": [{"kind": "exp_avg_sq", "steps": steps(33), "value": -1}],
}
ONE_SKIP = {kind for kind in KINDS if "loss" in kind or "gradient" in kind or "norm" in kind or "exchange" in kind}
SAMPLE = [("NaN on one rank after the exchange", "ddp"), ("norm x 30", "alone"), ("burst of 20", "fsdp")]
EVERY = [(kind, strategy) for kind in KINDS for strategy in STRATEGIES]
SEEDS = range(7) if LONG else [0]


def faulty(name: str, faults: list, folder: Path, *more: str, die_at: int = 0) -> subprocess.CompletedProcess[str]:
    environment = ENVIRONMENT | {"QWLIT_FAULTS": json.dumps(faults), "QWLIT_DIE_AT": str(die_at)}
    command = [interpreter(), "-m", "tests.faults.faulty", "train", *RUN, *more, f"run.name={name}"]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> dict[int, float]:
    """The last val/loss of runs without a fault, by seed."""
    folder = tmp_path_factory.mktemp("clean")
    found = {}
    for seed in SEEDS:
        done = faulty(str(seed), [], folder, f"seed={seed}")
        assert done.returncode == 0, done.stderr
        found[seed] = summary(folder / "runs" / str(seed))["val_loss_best"]
    return found


@pytest.mark.parametrize(("kind", "strategy"), EVERY if LONG else SAMPLE)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_fault_reaches_no_weight_and_the_run_ends_as_one_without_it(kind, strategy, seed, clean, tmp_path):
    done = faulty("a", KINDS[kind], tmp_path, f"seed={seed}", *STRATEGIES[strategy])
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "a"
    end = summary(run)
    assert (end["status"], end["steps"]) == ("done", 60)
    assert end["rollbacks"] == (0 if kind in ONE_SKIP else 1)
    if kind in ONE_SKIP:
        # With seeds 2 and 6 a healthy norm before is 5 times the median, and one of 10 times is no spike beside it.
        assert end["skipped_steps"] == 1 or (kind, end["skipped_steps"]) == ("norm x 10", 0)
    assert all(torch.isfinite(weight).all() for weight in weights(run).values())
    # Other data may be better: with seed 5 the run without two of every three steps is 0.16 below the clean one.
    assert end["val_loss_best"] < clean[seed] + 0.15


DIVERGES = [*RUN, "optim.lr=1", "preflight.allow=[full_lr]", "checkpoint.every_steps=5", "train.max_steps=50"]
KILLS = 10 if LONG else 1


def decisions(run: Path) -> list[dict]:
    return [
        {key: value for key, value in row.items() if key != "time"}
        for row in rows(run, "events.jsonl")
        if row["event"] in ("skip", "rollback")
    ]


@pytest.mark.parametrize("strategy", STRATEGIES if LONG else ["alone"])
def test_kills_around_a_rollback_and_its_warmup_change_nothing(strategy, tmp_path):
    settings = [*DIVERGES, *STRATEGIES[strategy]]
    whole = qwlit_process(["train", *settings, "run.name=whole"], tmp_path)
    assert whole.returncode == 0, whole.stderr
    assert [row["event"] for row in decisions(tmp_path / "runs/whole")] == ["rollback"]
    run, dice = tmp_path / "runs" / "cut", random.Random(7)
    kills = 0
    while kills < KILLS:
        process = WarmProcess(warm_command(["train", *settings, "run.name=cut"]), cwd=tmp_path, env=ENVIRONMENT)
        # The run goes back at step 22; kill it a few steps before, in the warm-up after, or later.
        before, more, deadline = steps_logged(run), dice.randint(1, 25), time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if abs(steps_logged(run) - before) >= more:
                kills += 1
                break
            time.sleep(0.01)
        process.kill()
        process.wait(timeout=60)
        if run.exists() and summary(run)["status"] == "done":
            assert_same_run(tmp_path / "runs/whole", run)
            shutil.rmtree(run)
    done = qwlit_process(["train", *settings, "run.name=cut"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "runs/whole", run)
    assert decisions(tmp_path / "runs/whole") == decisions(run)


TO_THE_START = ([], DIVERGES)
TO_A_CHECKPOINT = (KINDS["burst of 20"], [*RUN, "train.max_steps=40"])
FILE_CHANGES = range(1, 60) if LONG else [20]


@pytest.mark.parametrize(("faults", "settings"), [TO_THE_START, TO_A_CHECKPOINT] if LONG else [TO_THE_START])
def test_a_kill_between_two_writes_of_going_back_changes_nothing(faults, settings, tmp_path):
    whole = faulty("whole", faults, tmp_path, *settings)
    assert whole.returncode == 0, whole.stderr
    for number in FILE_CHANGES:
        killed = faulty("cut", faults, tmp_path, *settings, "run.overwrite=true", die_at=number)
        if killed.returncode == 0:
            break  # going back has fewer writes
        assert killed.returncode == 137, killed.stderr
        done = faulty("cut", faults, tmp_path, *settings)
        assert done.returncode == 0, (number, done.stderr)
        assert_same_run(tmp_path / "runs/whole", tmp_path / "runs/cut")
        assert decisions(tmp_path / "runs/whole") == decisions(tmp_path / "runs/cut")
    assert number > 1


def test_a_run_without_a_checkpoint_that_begins_with_another_learning_rate_forgets_its_rollbacks(tmp_path):
    short = [*DIVERGES, "checkpoint.every_steps=null", "guard.max_rollbacks=1"]
    stopped = faulty("a", [{"kind": "loss", "steps": [*range(9, 99)], "value": NAN}], tmp_path, *short)
    assert stopped.returncode == 3, stopped.stderr
    assert not list((tmp_path / "runs/a/checkpoints").iterdir())
    for name in ("a", "fresh"):
        done = faulty(name, [], tmp_path, *short, "optim.lr=1e-3")
        assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "runs/a", tmp_path / "runs/fresh")


def test_a_diverged_run_that_early_stopping_ends_is_not_done(tmp_path):
    words = [*DIVERGES, "optim.lr=3", "validation.every_steps=5", "validation.early_stopping_patience=1"]
    stopped = faulty("a", [], tmp_path, *words, "guard=strict")
    assert stopped.returncode == 3 and "stopped at step 10: the loss ends at" in stopped.stderr, stopped.stderr
    # No sample of the last step is the reason.
    assert stopped.stderr.endswith("; lower optim.lr\n")


class Count(lightning.Callback):
    """A user's callback that counts steps, in its state and beside it."""

    counted = beside = 0

    def state_dict(self):
        return {"counted": self.counted}

    def load_state_dict(self, state):
        self.counted = state["counted"]

    def on_train_batch_end(self, *args):
        self.counted += 1
        self.beside += 1


def test_a_users_callback_goes_back_to_the_start_with_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    count = Count()
    run = qwlit.train(*DIVERGES, "run.name=a", callbacks=[count])
    assert [row["step"] for row in decisions(run.path) if row["event"] == "rollback"] == [0]
    assert count.counted == 50 < count.beside
