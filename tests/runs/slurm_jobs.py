"""Submitting qwlit's jobs to a test's Slurm, and watching them."""

import contextlib
import re
import subprocess
import time
from pathlib import Path

from tests.runs.runs import ENVIRONMENT, TINY, command, warm_command

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


ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "OUT_OF_MEMORY")


def submit(cluster, words, place, *, warm: bool = True) -> int:
    """Submit a job and return its number. `warm`: its processes have imported everything already (tests/warm.py)."""
    launch = warm_command if warm else command
    done = subprocess.run(
        launch(["submit", *words]),
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
    while (state := cluster.job(job)).get("JobState") not in ENDS:
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
