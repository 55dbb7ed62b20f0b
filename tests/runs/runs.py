"""Running qwlit as a user does, and reading what it leaves behind."""

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from qwlit.__main__ import main
from qwlit.core.errors import ConfigError
from qwlit.inference import plain_proof
from qwlit.training.checkpointing.checkpoint import read_weights
from tests.warm import warm_python

DEMO = Path(__file__).parents[2] / "src" / "qwlit" / "resources" / "demo"
# One thread a process, so that tests do not slow each other down on small machines.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
UNCHANGED = dict(ENVIRONMENT)
TINY = [
    "model=demo",
    "model.architecture.num_hidden_layers=2",
    "model.architecture.hidden_size=64",
    "model.architecture.intermediate_size=96",
    "hardware=cpu",
    "optim.lr=1e-3",
    "logging.every_steps=1",
]


@cache
def interpreter() -> str:
    """A stand-in for Python that has imported everything already: see tests/warm.py."""
    return warm_python(Path(tempfile.mkdtemp(prefix="qwlit-warm-")), UNCHANGED)


def command(words: list[str]) -> list[str]:
    """The command line in Python itself: for signals, kills, launchers, and whatever imports decide."""
    return [sys.executable, "-m", "qwlit", *words]


def warm_command(words: list[str]) -> list[str]:
    """The command line without the seconds of its imports."""
    return [interpreter(), "-m", "qwlit", *words]


class WarmProcess(subprocess.Popen):
    """A warm launch whose signals go to the training itself: after `kill` and `wait` it has ended, too."""

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(warm_pid(self.pid), number)


def warm_pid(stand_in: int) -> int:
    """The process that runs for a stand-in for the interpreter, once it has been started."""
    file = Path(interpreter()).with_name(str(stand_in))
    deadline = time.monotonic() + 60
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < deadline, "the process was not started"
        time.sleep(0.01)
    return int(file.read_text())


def children(pid: int) -> list[int]:
    """The ranks that a rank 0 has started, without the processes for tables and chat templates."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if b"_worker.py" not in Path(f"/proc/{child}/cmdline").read_bytes()]


def qwlit_process(
    words: list[str], folder: Path, *, timeout: float = 240, environment: dict[str, str] = ENVIRONMENT
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own: for several ranks, and for settings that outlive a run."""
    return subprocess.run(
        warm_command(words), cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def qwlit(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line in this process, which has imported everything already; its children are warm too.

    A test's words replace earlier ones with the same key, e.g. those of TINY.
    """
    out, err = io.StringIO(), io.StringIO()
    torch.set_num_threads(1)
    argv, python = sys.argv, sys.executable
    sys.argv, sys.executable = ["qwlit", *words], interpreter()
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main()
    finally:
        sys.argv, sys.executable = argv, python
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def train(words: list[str], folder: Path, run: Callable[..., subprocess.CompletedProcess[str]] = qwlit) -> Path:
    """Train, expect success, return the run folder."""
    done = run(["train", *TINY, *words], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = (p for p in (folder / "runs").iterdir() if f"run.name={p.name}" in words)
    return made


def started(
    words: list[str], run: Path, *, logged: int, environment: dict[str, str] = ENVIRONMENT, warm: bool = True
) -> subprocess.Popen[str]:
    """Start a training in a process of its own and return it once `run` has so many logged losses.

    `warm=False`: its children are those of the process that is returned.
    """
    kind, launch = (WarmProcess, warm_command) if warm else (subprocess.Popen, command)
    process = kind(
        launch(["train", *TINY, *words]),
        cwd=run.parents[1],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while steps_logged(run) < logged:
        assert process.poll() is None and process.stderr, process.stderr and process.stderr.read()
        time.sleep(0.02)
    return process


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def succeed_together(jobs: list[tuple[list[str], dict[str, str]]], folder: Path, *, timeout: float) -> None:
    """Start processes, each its words and its environment, that meet one another; expect them all to end well."""
    processes = [
        subprocess.Popen(
            words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for words, environment in jobs
    ]
    said = [process.communicate(timeout=timeout)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(said)[-3000:]


def rows(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text(encoding="utf-8").splitlines()]


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["train/loss"]) for row in rows(run) if "train/loss" in row]


def steps_logged(run: Path) -> int:
    """Count the records with a loss; the run may be writing the last line now."""
    if not (run / "metrics.jsonl").exists():
        return 0
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    return sum('"train/loss"' in line for line in lines if line.endswith("\n"))


def weights(run: Path, pointer: str = "last") -> dict[str, torch.Tensor]:
    return dict(read_weights(run / "checkpoints" / pointer))


def tasks_of_srun(job_name: str = "train") -> list[dict[str, str]]:
    """The environments of two tasks that srun started on this machine."""
    job = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_NAME": job_name}
    job |= {"SLURM_NTASKS_PER_NODE": "2", "SLURM_NODELIST": "127.0.0.1", "SLURM_NODEID": "0", "SLURM_NNODES": "1"}
    job |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [ENVIRONMENT | job | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit: every logged loss, norm and validation, and every weight."""

    def numbers(run: Path) -> list[dict]:
        return [{k: v for k, v in row.items() if not k.startswith(("throughput", "memory"))} for row in rows(run)]

    assert numbers(a) == numbers(b)
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def in_this_process(job: Path, model: str) -> None:
    """In the place of `proof.run_plainly`: plain transformers in this process, because a fresh one imports for long."""
    try:
        plain_proof.main(json.loads(job.read_text(encoding="utf-8")))
    except Exception as error:
        raise ConfigError(f"transformers cannot use {model}: {error}") from None
