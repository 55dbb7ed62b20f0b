"""kill -9 at random moments, a third of them within a save: the run resumes to the same bits.

`QWLIT_LONG=1 pytest tests/faults/test_kills.py` kills 204 times: alone, DDP and FSDP2 on two ranks, with and without a
`TMPDIR` on another file system. It does so in four pieces of each kind; `-k ddp-3` kills as in the last one of DDP.
Else it kills each kind once within a save and once at a random moment.
"""

import random
import shutil
import time
from pathlib import Path

import pytest

from tests.faults.test_checkpoints import chat, words  # noqa: F401 - a fixture
from tests.long import LONG
from tests.runs.runs import ENVIRONMENT, WarmProcess, assert_same_run, qwlit_process, summary, warm_command

KINDS = {
    "alone": [],
    "ddp": ["hardware.devices=2", "hardware.strategy=ddp"],
    "fsdp": ["hardware.devices=2", "hardware.strategy=fsdp"],
}
PIECES, KILLS = (4, 17) if LONG else (1, 2)
"""Of each kind, and kills in a piece."""
STEPS = 40


def is_saving(run: Path) -> bool:
    return any((run / "checkpoints").glob(".step-*.tmp"))


def kill(
    settings: list[str], run: Path, dice: random.Random, *, within_save: bool, environment: dict[str, str]
) -> bool:
    """Start the training and kill it, unless it ends before; return whether it was within a save."""
    process = WarmProcess(warm_command(["train", *settings]), cwd=run.parents[1], env=environment)
    deadline = time.monotonic() + 120
    end = time.monotonic() + dice.uniform(0.2, 3.0)
    while process.poll() is None and time.monotonic() < deadline:
        if is_saving(run) if within_save else time.monotonic() > end:
            break
        time.sleep(0 if within_save else 0.01)
    was_saving = is_saving(run)
    process.kill()
    process.wait(timeout=60)
    return was_saving


@pytest.mark.parametrize("piece", range(PIECES))
@pytest.mark.parametrize("kind", KINDS)
def test_kills_at_random_moments_and_within_saves_change_nothing(kind, piece, chat, tmp_path):  # noqa: F811
    dice = random.Random(f"{kind} {piece}")
    long = ["checkpoint.every_steps=1", f"train.max_steps={STEPS}", "dropout=pretrain", *KINDS[kind]]
    whole = qwlit_process(["train", *words("whole", chat, *long)], tmp_path)
    assert whole.returncode == 0, whole.stderr
    run = tmp_path / "runs" / "cut"
    settings = words("cut", chat, *long)
    saving = 0
    for index in range(KILLS):
        elsewhere = {"TMPDIR": "/dev/shm"} if index % 2 and Path("/dev/shm").is_dir() else {}
        within = index % 3 == 0
        saving += kill(settings, run, dice, within_save=within, environment=ENVIRONMENT | elsewhere)
        if (run / "summary.json").exists() and summary(run)["status"] == "done":
            assert_same_run(tmp_path / "runs" / "whole", run)
            shutil.rmtree(run)
    done = qwlit_process(["train", *settings], tmp_path)
    assert done.returncode == 0, done.stderr
    assert saving, "no kill was within a save"
    assert_same_run(tmp_path / "runs" / "whole", run)
