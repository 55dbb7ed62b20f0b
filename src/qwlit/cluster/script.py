"""The batch file of a run: readable, and fit to be kept and edited."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from qwlit.config.run import RunConfig
from qwlit.config.settings import SlurmConfig
from qwlit.core.errors import ConfigError, one_line
from qwlit.core.slurm import time_limit_seconds
from qwlit.training.config import HardwareConfig

# hardware.num_workers=auto with CUDA (training/machine.py).
AUTO_WORKERS = 4
# Requeues of a job that is told to leave before Python listens: nobody counts its progress. An assumption.
MOST_EARLY_REQUEUES = 20
# Both also in the files in slurm/, before and after srun.
NAME_JOB = """\
# A task of an array is called by both its numbers.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
# The run asks for its requeue by itself. Where it finds no scontrol, as in a container, it makes this file.
export QWLIT_REQUEUE_FILE="$PWD/.requeue-$job"
rm -f "$QWLIT_REQUEUE_FILE"
"""
ASK_FOR_REQUEUE = f"""\
# 140: told to leave before Python could listen. PreemptTime: Slurm makes room for another job; the run was not ready.
facts=$(scontrol show job --oneliner "$job" || true)
again=no
if [ -e "$QWLIT_REQUEUE_FILE" ]; then again=yes; rm -f "$QWLIT_REQUEUE_FILE"; fi
if [ "$code" -eq 140 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {MOST_EARLY_REQUEUES} ]; then again=yes; fi
if [ "$code" -ne 0 ] && [[ $facts == *PreemptTime=2* ]]; then again=yes; fi
# What somebody cancelled is not running any more.
if [ "$again" = yes ] && [[ $facts =~ JobState=(RUNNING|SIGNALING) ]]; then scontrol requeue "$job" || true; fi
exit "$code"
"""
# Slurm's own names for a job in a shell; Lightning would take them for a session that is typed into.
INTERACTIVE = ("bash", "interactive")


@dataclass(frozen=True)
class SlurmJob:
    """What the job runs."""

    name: str
    """Of the job and of its log."""
    title: str
    """Words of `submit`, for the reader of the file."""
    arguments: list[str]
    """Words after `python -m qwlit`; shell variables among them are kept."""
    ranks_by_srun: bool = True
    """One task a device, started by srun; False: one task, which starts its own processes."""
    array: str | None = None
    """Slurm's --array."""
    before: tuple[str, ...] = ()
    """Shell lines that set variables for the words."""


def render(config: RunConfig, job: SlurmJob, *, python: str, folder: Path) -> str:
    """Write the batch file.

    Args:
        python: the interpreter that has qwlit; a container's own is `python`.
        folder: where the command was typed: relative paths are meant from there.

    Raises:
        ConfigError: the settings name no number of devices.
    """
    slurm = config.slurm
    interpreter = "python" if slurm.container else shlex.quote(python)
    container = _container(slurm, folder) if slurm.container else ""
    command = " ".join([interpreter, "-m", "qwlit", *job.arguments])
    lines = [
        "#!/bin/bash",
        f"# Written by: qwlit submit {one_line(job.title)}",
        "# Preempted, or out of time, the job is requeued and the run goes on from its newest checkpoint.",
        *(f"#SBATCH {shlex.quote(option)}" for option in _options(config, job)),
        "",
        "# What fails before the run ends the job. No -u: other people's set-up lines read variables that are not set.",
        "set -e",
        "# The shell outlives the signals: it waits for the run, which saves.",
        "trap : USR2 TERM",
        f"cd {shlex.quote(str(folder))}",
        *slurm.setup,
        *job.before,
        "",
        *NAME_JOB.splitlines(),
        "",
        "# srun starts the ranks, one a device, ends all when one has failed, and waits for rank 0, which exports."
        if job.ranks_by_srun
        else "# One task: it starts its own processes.",
        # By itself srun gives a task one core since Slurm 22.05.
        "code=0",
        f'srun --kill-on-bad-exit=1 --wait=0 --cpus-per-task="$SLURM_CPUS_PER_TASK"{container} {command} || code=$?',
    ]
    return "\n".join(lines) + "\n" + ASK_FOR_REQUEUE


def _container(slurm: SlurmConfig, folder: Path) -> str:
    """Return Pyxis' options: by itself an image sees nothing of the host, and starts in a folder of its own."""
    mounts = ",".join([f"{folder}:{folder}", *slurm.mounts])
    options = {"image": str(slurm.container), "mounts": mounts, "workdir": str(folder)}
    return "".join(f" --container-{key}={shlex.quote(value)}" for key, value in options.items())


def _options(config: RunConfig, job: SlurmJob) -> list[str]:
    slurm, hardware = config.slurm, config.hardware
    output = "%x-%A_%a.out" if job.array else "%x-%j.out"
    chosen = {
        "job-name": f"{job.name}-run" if job.name in INTERACTIVE else job.name,
        **_shape(hardware, job),
        "time": slurm.time,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "array": job.array,
        "signal": f"USR2@{slurm.signal_seconds}",
        "output": output,
        "open-mode": "append",
    }
    return [f"--{key}={value}" for key, value in chosen.items() if value is not None] + ["--requeue", *slurm.options]


def _shape(hardware: HardwareConfig, job: SlurmJob) -> dict[str, object]:
    """Return nodes, tasks, GPUs, cores and memory."""
    if hardware.devices == "auto":
        raise ConfigError(
            "hardware.devices=auto: a job must say how many it wants; choose a hardware profile, e.g. hardware=a100x4,"
            " or type hardware.devices"
        )
    uses_gpus = hardware.accelerator != "cpu"
    workers = hardware.num_workers if hardware.num_workers != "auto" else AUTO_WORKERS * uses_gpus
    tasks = hardware.devices if job.ranks_by_srun else 1
    return {
        "nodes": hardware.num_nodes,
        "ntasks-per-node": tasks,
        "gpus-per-node": hardware.devices if uses_gpus else None,
        "cpus-per-task": (workers + 1) * hardware.devices // tasks,
        "mem": f"{hardware.host_memory_gb}G" if hardware.host_memory_gb else None,
    }


def quoted(words: list[str]) -> list[str]:
    return [shlex.quote(word) for word in words]


# What the file sets itself, by the setting that decides it; short forms beside it.
OWNED = {
    "nodes": "hardware.num_nodes",
    "ntasks": "hardware.devices",
    "ntasks-per-node": "hardware.devices",
    "gpus": "hardware.devices",
    "gpus-per-node": "hardware.devices",
    "gpus-per-task": "hardware.devices",
    "ntasks-per-gpu": "hardware.devices",
    "cpus-per-task": "hardware.num_workers",
    "cpus-per-gpu": "hardware.num_workers",
    "mem-per-cpu": "hardware.host_memory_gb",
    "mem-per-gpu": "hardware.host_memory_gb",
    "time": "slurm.time",
    "partition": "slurm.partition",
    "account": "slurm.account",
    "qos": "slurm.qos",
    "constraint": "slurm.constraint",
    "signal": "slurm.signal_seconds",
    "job-name": "run.name",
    "array": "seeds=[…], or sweep=… tasks=…",
}
SHORT = {
    "N": "nodes",
    "n": "ntasks",
    "G": "gpus",
    "c": "cpus-per-task",
    "t": "time",
    "p": "partition",
    "A": "account",
    "q": "qos",
    "C": "constraint",
    "J": "job-name",
    "a": "array",
}
ALWAYS = ("requeue", "no-requeue", "open-mode")


def check_slurm(config: SlurmConfig) -> None:
    """Refuse options that the file sets itself, and a time limit that leaves no time to train.

    Raises:
        ConfigError: naming the option and the setting to use.
    """
    for option in config.options:
        if not re.match(r"--?[A-Za-z]", option):
            raise ConfigError(
                f"slurm.options: '{option}' is no option of sbatch; write --name=value, and quote what has a comma"
            )
        name = option[2:].partition("=")[0] if option.startswith("--") else SHORT.get(option[1], option[1])
        if name in ALWAYS:
            raise ConfigError(f"slurm.options: --{name} is not to be chosen; a job that is requeued depends on it")
        if name == "gres" and "gpu" in option:
            name = "gpus"
        if name in OWNED:
            raise ConfigError(f"slurm.options: {option} would be set twice; set {OWNED[name]}")
    limit = time_limit_seconds(config.time)
    if limit is not None and limit <= config.signal_seconds:
        raise ConfigError(
            f"slurm.signal_seconds={config.signal_seconds} is no less than slurm.time={config.time} ({limit} s):"
            " the run would be told to save as it starts; raise slurm.time"
        )
