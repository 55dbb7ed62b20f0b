"""Jobs on a real Slurm (tests/slurm_cluster.py): preempted, requeued, and in the end one continuous run.

QWLIT_LONG=1 adds what takes long: fifty preemptions instead of ten, and real time limits.
"""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs.runs import ENVIRONMENT, TINY, assert_same_run, command, losses, qwlit, qwlit_process, rows, summary
from tests.slurm_cluster import Cluster, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
LONG = os.environ.get("QWLIT_LONG") == "1"
PREEMPTIONS = 50 if LONG else 10
WORDS = [
    *TINY,
    "recipe=pretrain",
    "data.path=chat.jsonl",
    "data.val_fraction=0.25",
    "train.global_batch_size=4",
    "validation.early_stopping_patience=null",
    "validation.each_epoch=false",
    "checkpoint.each_epoch=false",
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture
def place(tmp_path):
    turns = [
        {"messages": [{"role": "user", "content": f"{n} plus {n}?"}, {"role": "assistant", "content": f"{2 * n}. 好"}]}
        for n in range(40)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(turn) + "\n" for turn in turns), encoding="utf-8")
    return tmp_path


def submit(cluster, words, place) -> int:
    done = subprocess.run(
        command(["submit", *words]),
        cwd=place,
        env=ENVIRONMENT | cluster.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(re.fullmatch(r"Submitted batch job (\d+)", done.stdout.splitlines()[-1])[1])


def finished(cluster, job, *, seconds=240, meanwhile=lambda state: None) -> dict[str, str]:
    end = time.monotonic() + seconds
    while (state := cluster.job(job)).get("JobState") in (
        "PENDING",
        "RUNNING",
        "COMPLETING",
        "CONFIGURING",
        "REQUEUED",
    ):
        assert time.monotonic() < end, f"{state}\n{said(Path(state['WorkDir']))[-2000:]}"
        meanwhile(state)
        time.sleep(0.2)
    return state


def said(place) -> str:
    return "".join(file.read_text(errors="replace") for file in sorted(place.glob("*.out")))


def tasks(place) -> dict[int, int]:
    """Process of each rank, by its number."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, KeyError, ValueError):
            if not entry.name.isdigit() or (entry / "cwd").readlink() != place:
                continue
            words = (entry / "cmdline").read_bytes().split(b"\0")
            variables = dict(v.split("=", 1) for v in (entry / "environ").read_text().split("\0") if "=" in v)
            if b"train" in words and b"-m" in words and "SLURM_STEP_ID" in variables and b"srun" not in words[0]:
                found[int(variables["SLURM_PROCID"])] = int(entry.name)
    return found


def test_a_run_preempted_at_random_moments_is_the_uninterrupted_run(cluster, place):
    steps = 60 * PREEMPTIONS
    words = [*WORDS, f"train.max_steps={steps}", "validation.every_steps=50", "hardware.devices=2"]
    # In CI a start takes most of the time, and a signal in it costs a start: many of them in a row are no fault.
    job = submit(cluster, [*words, "run.name=job", "slurm.time=60", "slurm.max_requeues_in_place=50"], place)
    run = place / "runs" / "job"
    dice = random.Random(1)
    sent = {"count": 0, "restarts": -1, "at": 0.0}

    def preempt(state):
        """Once in each life of the job: at once, while it starts, or some steps on; all ranks, or one of them."""
        life = int(state["Restarts"])
        if sent["count"] == PREEMPTIONS or state["JobState"] != "RUNNING" or life != sent["count"]:
            return
        if life != sent["restarts"]:
            sent["restarts"] = life
            # Two of three while it trains, wherever it then is; the others while it starts.
            sent["steps"] = dice.randrange(1, 40) if dice.random() < 0.67 else None
            sent["at"] = time.monotonic() + dice.uniform(0.3, 6.0)
            sent["from"] = len(losses(run)) if (run / "metrics.jsonl").exists() else 0
        trained = (len(losses(run)) if (run / "metrics.jsonl").exists() else 0) - sent["from"]
        if trained < sent["steps"] if sent["steps"] else time.monotonic() < sent["at"]:
            return
        ranks = tasks(place)
        if not ranks:  # Slurm signals steps, and there is none yet
            return
        if sent["steps"] and sent["count"] % 3 == 0 and len(ranks) == 2:
            os.kill(ranks[dice.randrange(2)], signal.SIGUSR2)
        else:
            cluster.ask("scancel", "--signal=USR2", str(job), check=False)
        sent["count"] += 1

    state = finished(cluster, job, seconds=60 + 45 * PREEMPTIONS, meanwhile=preempt)
    assert state["JobState"] == "COMPLETED", said(place)[-3000:]
    assert int(state["Restarts"]) == PREEMPTIONS == sent["count"]
    assert [step for step, _ in losses(run)] == list(range(1, steps + 1))
    # Saved at the boundary where it was told: no step was made twice.
    events = rows(run, "events.jsonl")
    left = [event["step"] for event in events if event["event"] == "preempted"]
    assert len(left) >= PREEMPTIONS // 2
    assert [event["step"] for event in events if event["event"] == "resumed"][-1] == left[-1]
    reference = qwlit_process(["train", *words, "run.name=whole"], place)
    assert reference.returncode == 0, reference.stderr
    assert_same_run(run, place / "runs" / "whole")


def test_two_nodes_of_two_tasks_compute_what_one_process_does(cluster, place):
    words = [*WORDS, "train.max_steps=8", "dropout=none"]
    nodes = ["hardware.num_nodes=2", "hardware.devices=2", "slurm.time=10"]
    jobs = {
        strategy: submit(cluster, [*words, *nodes, f"hardware.strategy={strategy}", f"run.name={strategy}"], place)
        for strategy in ("ddp", "fsdp")
    }
    for job in jobs.values():
        assert finished(cluster, job)["JobState"] == "COMPLETED", said(place)[-3000:]
    assert qwlit(["train", *words, "run.name=one"], place).returncode == 0
    alone = losses(place / "runs" / "one")
    for strategy in jobs:
        together = losses(place / "runs" / strategy)
        assert max(abs(a - b) for (_, a), (_, b) in zip(alone, together, strict=True)) < 2e-5
        assert json.loads((place / "runs" / strategy / "manifest.json").read_text())["num_nodes"] == 2


def test_a_sweep_shared_by_the_tasks_of_an_array(cluster, place):
    fixed = ", ".join(f"'{word}'" for word in WORDS)
    document = f"""
method: random
metric: {{name: val/loss, goal: minimize}}
parameters:
  optim.lr: {{distribution: log_uniform_values, min: 1.0e-4, max: 1.0e-2}}
command: ["${{env}}", "${{interpreter}}", -m, qwlit, train, {fixed}, "${{args_no_hyphens}}"]
"""
    (place / "mine.yaml").write_text(document)
    words = [
        "sweep=mine.yaml",
        "trials=4",
        "tasks=2",
        "train.max_steps=4",
        "validation.each_epoch=true",
        "hardware.devices=1",
        "slurm.time=10",
    ]
    job = submit(cluster, words, place)
    for task in (0, 1):
        assert finished(cluster, f"{job}_{task}")["JobState"] == "COMPLETED", said(place)[-3000:]
    trials = json.loads((place / "runs" / "mine" / "sweep.json").read_text())["trials"]
    assert [trial["state"] for trial in trials] == ["done"] * 4
    begun = [file.read_text().count("begins") for file in place.glob("*.out")]
    assert len(begun) == 2
    assert sum(begun) == 4


def test_seeds_are_an_array_of_runs(cluster, place):
    job = submit(cluster, [*WORDS, "seeds=[3,4]", "run.name=s", "train.max_steps=2", "hardware.devices=1"], place)
    for task in (0, 1):
        assert finished(cluster, f"{job}_{task}")["JobState"] == "COMPLETED", said(place)[-3000:]
    first, second = (losses(place / "runs" / f"s-seed{seed}") for seed in (3, 4))
    assert first != second


def test_a_cancelled_job_is_saved_and_not_requeued(cluster, place):
    job = submit(cluster, [*WORDS, "train.max_steps=4000", "hardware.devices=2", "run.name=c", "slurm.time=9"], place)
    run = place / "runs" / "c"

    def cancel(state):
        if (run / "metrics.jsonl").exists() and len(losses(run)) > 5:
            cluster.ask("scancel", str(job))

    state = finished(cluster, job, meanwhile=cancel)
    assert state["JobState"] == "CANCELLED"
    assert state["Restarts"] == "0"
    deadline = time.monotonic() + 20
    while summary(run)["status"] == "running" and time.monotonic() < deadline:
        time.sleep(0.2)
    assert summary(run)["status"] == "preempted"
    assert (run / "checkpoints" / "last").exists()


def test_a_job_that_only_starts_and_stops_is_left_in_the_end(cluster, place):
    words = [*WORDS, "train.max_steps=50", "hardware.devices=1", "run.name=loop", "slurm.max_requeues_in_place=1"]
    job = submit(cluster, words, place)
    seen = set()

    def tell(state):
        if state["JobState"] == "RUNNING" and state["Restarts"] not in seen and tasks(place):
            time.sleep(1.5)
            seen.add(state["Restarts"])
            cluster.ask("scancel", "--signal=USR2", str(job), check=False)

    state = finished(cluster, job, meanwhile=tell)
    assert state["JobState"] == "FAILED", said(place)[-2000:]
    assert state["Restarts"] == "1"
    assert "requeued 1 times at step 0 without one step more" in said(place)


def test_a_run_in_use_and_tasks_that_are_not_the_devices_are_refused(cluster, place):
    first = submit(cluster, [*WORDS, "train.max_steps=4000", "hardware.devices=1", "run.name=x"], place)
    run = place / "runs" / "x"
    while not (run / "metrics.jsonl").exists():
        assert cluster.job(first)["JobState"] in ("PENDING", "RUNNING"), said(place)
        time.sleep(0.2)
    second = submit(cluster, [*WORDS, "train.max_steps=4000", "hardware.devices=1", "run.name=x"], place)
    state = finished(cluster, second)
    assert (state["JobState"], state["ExitCode"]) == ("FAILED", "2:0")
    assert "in use by another process" in said(place)
    cluster.ask("scancel", "--full", "--signal=KILL", str(first))
    finished(cluster, first)
    train = [*command(["train", *WORDS, "run.name=y", "train.max_steps=2", "hardware.devices=1"])]
    environment = ENVIRONMENT | cluster.environment
    wrong = subprocess.run(
        ["srun", "-n2", *train], cwd=place, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert wrong.returncode == 2
    assert "2 processes were launched" in wrong.stderr
    script = f"#!/bin/bash\n#SBATCH --ntasks=2\n{' '.join(train)}\n"
    (place / "plain.sh").write_text(script)
    number = cluster.ask(
        "sbatch",
        "--parsable",
        "plain.sh",
        cwd=place,
        **{k: v for k, v in ENVIRONMENT.items() if k in ("PATH", "OMP_NUM_THREADS")},
    )
    state = finished(cluster, int(number))
    assert (state["JobState"], state["ExitCode"]) == ("FAILED", "2:0")
    assert "srun" in said(place)


@pytest.mark.skipif(not LONG, reason="takes minutes; QWLIT_LONG=1")
def test_a_run_longer_than_its_time_limit_is_requeued_until_it_is_done(cluster, place):
    words = [*WORDS, "train.max_steps=20000", "checkpoint.every_steps=100000", "logging.every_steps=100"]
    job = submit(
        cluster, [*words, "hardware.devices=2", "run.name=limit", "slurm.time=1", "slurm.signal_seconds=30"], place
    )
    state = finished(cluster, job, seconds=1500)
    assert state["JobState"] == "COMPLETED", said(place)[-3000:]
    assert int(state["Restarts"]) >= 2
    steps = [step for step, _ in losses(place / "runs" / "limit")]
    assert steps == sorted(set(steps))
    assert steps[-1] == 20000


def test_python_of_the_environment_is_the_jobs(place):
    shown = qwlit(["submit", *WORDS, "hardware.devices=2", "dry_run=true"], place)
    assert shown.returncode == 0
    assert f"srun --kill-on-bad-exit=1 --wait=0 {sys.executable} -m qwlit train" in shown.stdout
