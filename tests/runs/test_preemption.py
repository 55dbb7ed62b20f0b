"""SIGTERM and SIGUSR2 at any moment, to any process, outside Slurm: one continuous run in the end, to the bit.

QWLIT_LONG=1 sends thirty signals to each launcher instead of a few.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import qwlit
from qwlit.training.resilience.preemption import StopOnSignal
from tests.long import LONG
from tests.runs.runs import (
    ENVIRONMENT,
    TINY,
    assert_same_run,
    command,
    free_port,
    losses,
    qwlit_process,
    steps_logged,
    summary,
    warm_command,
)
from tests.runs.runs import qwlit as run_here

SIGNALS = 30 if LONG else 2
WORDS = [
    *TINY,
    "recipe=pretrain",
    "data.path=chat.jsonl",
    "train.global_batch_size=4",
    "checkpoint.each_epoch=false",
    f"train.max_steps={60 * SIGNALS}",
]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
# Else SIGUSR2 ends the launcher, and with it the ranks.
TORCHRUN += ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2"]


def ranks_below(launcher: int, place) -> list[int]:
    """Trainings that `launcher` has started."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and (entry / "cwd").readlink() == place and int(entry.name) != launcher:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if b"qwlit" in words and b"train" in words and b"torch.distributed.run" not in words:
                    found.append(int(entry.name))
    return sorted(found)


def test_a_signal_to_every_process_spares_the_loaders_workers_and_the_run_goes_on(place):
    """Slurm signals all processes of a task, and so does a terminal."""
    words = ["train", *WORDS, "hardware.devices=2", "hardware.num_workers=2", "run.name=cut"]
    run = place / "runs" / "cut"
    for number, code in ((signal.SIGUSR2, 75), (signal.SIGTERM, 75), (signal.SIGINT, 130)):
        before = steps_logged(run)
        process = subprocess.Popen(
            command(words), cwd=place, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        while steps_logged(run) < before + 10:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        os.killpg(process.pid, number)
        if number == signal.SIGUSR2:
            # Slurm follows it by a SIGTERM when it gives the nodes away.
            time.sleep(0.1)
            os.killpg(process.pid, signal.SIGTERM)
        said = [line for line in process.communicate(timeout=60)[1].splitlines() if "waits for other ranks" not in line]
        assert (process.returncode, len(said)) == (code, 1), said
        assert "run the same command to resume" in said[0]
    assert qwlit_process(words, place).returncode == 0
    whole = ["train", *WORDS, "hardware.devices=2", "run.name=whole"]
    assert qwlit_process(whole, place).returncode == 0
    assert_same_run(run, place / "runs" / "whole")
    assert ranks_below(0, place) == []


@pytest.mark.parametrize("launcher", ["python", "python, 2 ranks", "torchrun"])
def test_signals_at_random_moments_change_nothing(launcher, place):
    words = ["train", *WORDS, *([] if launcher == "python" else ["hardware.devices=2"])]
    # One process imports as a user's does, so that signals also meet its imports; ranks have imported already.
    start = {
        "python": command(words),
        "python, 2 ranks": warm_command(words),
        "torchrun": [*TORCHRUN, "--no-python", *warm_command(words)],
    }[launcher]
    # Seconds until the first step.
    starting = {"python": 5.0, "python, 2 ranks": 1.0, "torchrun": 4.0}[launcher]
    run = place / "runs" / "cut"
    dice = random.Random(launcher)
    sent = lives = 0
    while True:
        lives += 1
        assert lives < 3 * SIGNALS + 5
        before = steps_logged(run)
        with (place / "said.log").open("ab") as log:
            process = subprocess.Popen([*start, "run.name=cut"], cwd=place, env=ENVIRONMENT, stdout=log, stderr=log)
        # A signal while it starts, or after a few steps.
        moment = time.monotonic() + dice.uniform(0.1, starting) if dice.random() < 0.3 else None
        steps = dice.randrange(1, 50)
        while process.poll() is None and sent < SIGNALS:
            time.sleep(0.02)
            if time.monotonic() < moment if moment else steps_logged(run) - before < steps:
                continue
            targets = [process.pid, *ranks_below(process.pid, place)]
            # Each process in its turn, torchrun's own as well.
            target = targets[sent % len(targets)]
            number = dice.choice([signal.SIGTERM, signal.SIGUSR2])
            if moment and launcher != "python":
                # Ranks that are still starting are told by their launcher.
                target = process.pid
                number = signal.SIGTERM
            with contextlib.suppress(ProcessLookupError):
                os.kill(target, number)
                sent += 1
            break
        process.wait(timeout=120)
        if process.returncode == 0 and summary(run)["status"] == "done":
            break
        assert launcher == "torchrun" or process.returncode in (75, -signal.SIGTERM), (place / "said.log").read_text()
    assert sent == SIGNALS
    assert [step for step, _ in losses(run)] == list(range(1, 60 * SIGNALS + 1))
    # torchrun ends in a traceback of its own.
    assert launcher == "torchrun" or "Traceback" not in (place / "said.log").read_text()
    assert f'File "{Path(qwlit.__file__).parent}' not in (place / "said.log").read_text()
    whole = qwlit_process([*words, "run.name=whole"], place)
    assert whole.returncode == 0, whole.stderr
    assert_same_run(run, place / "runs" / "whole")


def test_a_signal_in_the_last_step_is_answered_before_the_run_is_finished(place, monkeypatch):
    """Answering prompts and writing the export may take longer than Slurm waits."""
    boundary = StopOnSignal.on_step_boundary

    def told(self, trainer, module, step):
        if step == 5:
            signal.raise_signal(signal.SIGTERM)
        boundary(self, trainer, module, step)

    words = ["train", *WORDS, "train.max_steps=5", "run.name=a"]
    run = place / "runs" / "a"
    with monkeypatch.context() as patched:
        patched.setattr(StopOnSignal, "on_step_boundary", told)
        assert run_here(words, place).returncode == 75
    assert (summary(run)["status"], (run / "export").exists()) == ("preempted", False)
    assert run_here(words, place).returncode == 0
    assert [step for step, _ in losses(run)] == [1, 2, 3, 4, 5]
    assert (run / "export").exists()


@pytest.mark.parametrize("what", ["qwlit's code", "data"])
def test_a_rank_with_other_code_or_data_is_refused_before_anything_is_trained(what, place):
    other = place / "other"
    other.mkdir()
    if what == "data":
        # Another node's copy of the file.
        (other / "chat.jsonl").write_text((place / "chat.jsonl").read_text().replace("4. ", "5. "))
    else:
        shutil.copy(place / "chat.jsonl", other)
        shutil.copytree(Path(qwlit.__file__).parent, other / "qwlit")
        shutil.copytree(Path(qwlit.__file__).parents[2] / "conf", other / "qwlit" / "conf")
        file = other / "qwlit" / "optim" / "schedules.py"
        file.write_text(file.read_text() + "\n# another commit\n")
    port = str(free_port())
    processes = []
    for rank in range(2):
        job = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        job |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "x", "GROUP_RANK": "0"}
        job |= {"PYTHONPATH": str(other)} if rank and what != "data" else {}
        words = command(["train", *WORDS, f"run.root={place}/runs", "run.name=a", "hardware.devices=2"])
        folder = other if rank else place
        processes.append(subprocess.Popen(words, cwd=folder, env=ENVIRONMENT | job, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], said
    assert f"differs from rank 0 in {what}:" in said[0]
    assert steps_logged(place / "runs" / "a") == 0
