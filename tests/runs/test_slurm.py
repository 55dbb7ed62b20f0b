"""On a real Slurm (tests/slurm_cluster.py): several nodes, arrays, the files in slurm/; and what is refused."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.runs.runs import ENVIRONMENT, command, interpreter, losses, qwlit, qwlit_process, summary
from tests.runs.slurm_jobs import ENDS, WORDS, finished, said, submit
from tests.slurm_cluster import why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
FILES = Path(__file__).parents[2] / "slurm"


def test_two_nodes_of_two_tasks_compute_what_one_process_does(cluster, place):
    words = [*WORDS, "train.max_steps=8", "dropout=none"]
    nodes = ["hardware.num_nodes=2", "hardware.devices=2", "slurm.time=10"]
    jobs = {
        strategy: submit(
            cluster, [*words, *nodes, f"hardware.strategy={strategy}", f"run.name={strategy}"], place, warm=False
        )
        for strategy in ("ddp", "fsdp")
    }
    for job in jobs.values():
        assert finished(cluster, job)["JobState"] == "COMPLETED", said(place)[-12000:]
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
    told = []

    def preempt(state):
        """One of the two, in its first trial."""
        if not told and state["JobState"] == "RUNNING" and list((place / "runs" / "mine").glob("*/metrics.jsonl")):
            told.append(cluster.ask("scancel", "--signal=USR2", f"{job}_0"))

    restarts = []
    for task in (0, 1):
        state = finished(cluster, f"{job}_{task}", meanwhile=preempt)
        assert state["JobState"] == "COMPLETED", said(place)[-12000:]
        restarts.append(state["Restarts"])
    assert restarts == ["1", "0"]
    trials = json.loads((place / "runs" / "mine" / "sweep.json").read_text())["trials"]
    assert [trial["state"] for trial in trials] == ["done"] * 4
    begun = [file.read_text().count("begins") for file in place.glob("*.out")]
    assert len(begun) == 2
    # The one that was preempted begins again.
    assert sum(begun) in (4, 5)


def test_seeds_are_an_array_of_runs(cluster, place):
    words = [*WORDS, "seeds=[3,4]", "run.name=种", "train.max_steps=2", "hardware.devices=1"]
    job = submit(cluster, [*words, "slurm.options=['--comment=two words',--mem=1G]"], place)
    for task in (0, 1):
        state = finished(cluster, f"{job}_{task}")
        assert state["JobState"] == "COMPLETED", said(place)[-12000:]
        assert (state["JobName"], state["Comment"], state["MinMemoryNode"]) == ("种", "two", "1G")
    first, second = (losses(place / "runs" / f"种-seed{seed}") for seed in (3, 4))
    assert first != second


@pytest.mark.skipif(not (Path(sys.prefix) / "bin" / "activate").exists(), reason="the files activate an environment")
def test_the_files_to_be_edited_run_as_they_are(cluster, place, online):
    words = [*WORDS, "train.max_steps=3"]
    trial = ["-m", "qwlit", "train", *words, "validation.every_steps=3"]
    document = {
        "method": "grid",
        "metric": {"name": "val/loss", "goal": "minimize"},
        "parameters": {"seed": {"values": [1, 2]}},
        "command": ["${env}", "${interpreter}", *trial, "logger=wandb", "${args_no_hyphens}"],
    }
    (place / "mine.yaml").write_text(yaml.safe_dump(document))
    made = qwlit_process(["sweep", "sweep=mine.yaml", "agents=0"], place, environment=online)
    sweep = re.search(r"sweep (\S+/\S+/\S+)", made.stdout)
    assert sweep, made.stderr
    # As many tasks as two cores bear; else as they lie there.
    commands = [
        ["train_gpu.sbatch", *words, "run.name=gpu"],
        ["--ntasks-per-node=2", "train.sbatch", *words, "hardware.devices=2", "run.name=node"],
        ["--ntasks-per-node=1", "train_nodes.sbatch", *words, "hardware.num_nodes=2", "run.name=nodes"],
        ["--array=1-2", "sweep_agents.sbatch", sweep[1]],
    ]
    variables = {name: value for name, value in online.items() if name.startswith(("WANDB", "OMP", "NETRC"))}
    jobs = []
    for parts in commands:
        at = next(at for at, part in enumerate(parts) if part.endswith(".sbatch"))
        parts[at] = str(FILES / parts[at])
        job = cluster.ask("sbatch", "--parsable", *parts, cwd=place, QWLIT_VENV=sys.prefix, **variables).strip()
        jobs += [f"{job}_1", f"{job}_2"] if "--array=1-2" in parts else [job]
    for job in jobs:
        assert finished(cluster, job)["JobState"] == "COMPLETED", said(place)[-12000:]
    for name in ("gpu", "node", "nodes"):
        assert summary(place / "runs" / name)["status"] == "done"
    trials = [json.loads(file.read_text()) for file in (place / "runs").glob("*/*/summary.json")]
    assert [trial["status"] for trial in trials] == ["done"] * 2


def test_a_run_in_use_and_tasks_that_are_not_the_devices_are_refused(cluster, place):
    first = submit(cluster, [*WORDS, "train.max_steps=4000", "hardware.devices=1", "run.name=x"], place)
    run = place / "runs" / "x"
    while not (run / "metrics.jsonl").exists():
        assert cluster.job(first)["JobState"] not in ENDS, said(place)
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


def test_repeats_are_as_many_seeds_from_the_settings_own_on(place):
    words = ["submit", *WORDS, "hardware.devices=2", "dry_run=true", "seed=3", "run.name=a"]
    repeated, listed = (qwlit([*words, which], place) for which in ("repeats=3", "seeds=[3,4,5]"))
    assert repeated.returncode == 0 and repeated.stdout == listed.stdout and "seeds=(3 4 5)" in listed.stdout
    for more, reason in ((["repeats=1"], "at least 2"), (["repeats=2", "seeds=[0,1]"], "leave one of them out")):
        wrong = qwlit([*words, *more], place)
        assert wrong.returncode == 2 and reason in wrong.stderr


def test_python_of_the_environment_is_the_jobs(place):
    shown = qwlit(["submit", *WORDS, "hardware.devices=2", "dry_run=true"], place)
    assert shown.returncode == 0
    assert f' --cpus-per-task="$SLURM_CPUS_PER_TASK" {interpreter()} -m qwlit train' in shown.stdout
