"""Write the batch file of a run so that a user can read, keep and edit it."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from qwlit.config.run import RunConfig
from qwlit.config.settings import SlurmConfig
from qwlit.core.errors import ConfigError, one_line
from qwlit.core.slurm import time_limit_seconds
from qwlit.training.config import HardwareConfig

# The value of hardware.num_workers=auto with CUDA (training/machine.py).
AUTO_WORKERS = 4
# How often a job may be requeued that Slurm signals before Python listens. Its progress is not counted. An assumption.
MOST_EARLY_REQUEUES = 20
# The files in slurm/ contain both texts as well, before and after srun.
NAME_JOB = """\
# A task of an array has an ID of two numbers.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
# The run requeues its job itself. If it finds no scontrol, as in a container, it creates this file instead.
export QWLIT_REQUEUE_FILE="$PWD/.requeue-$job"
rm -f "$QWLIT_REQUEUE_FILE"
"""
ASK_FOR_REQUEUE = f"""\
# Code 140: a signal came before Python listened. PreemptTime: Slurm preempts the job, and the run could not requeue.
facts=$(scontrol show job --oneliner "$job" || true)
again=no
if [ -e "$QWLIT_REQUEUE_FILE" ]; then again=yes; rm -f "$QWLIT_REQUEUE_FILE"; fi
if [ "$code" -eq 140 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {MOST_EARLY_REQUEUES} ]; then again=yes; fi
if [ "$code" -ne 0 ] && [[ $facts == *PreemptTime=2* ]]; then again=yes; fi
# Never requeue a job that a user cancelled: it is no longer running.
if [ "$again" = yes ] && [[ $facts =~ JobState=(RUNNING|SIGNALING) ]]; then scontrol requeue "$job" || true; fi
exit "$code"
"""
SRUN = "srun --export=ALL --kill-on-bad-exit=1 --wait=0"
# Slurm's own names for interactive jobs: Lightning would treat the job as interactive.
INTERACTIVE = ("bash", "interactive")


@dataclass(frozen=True)
class SlurmJob:
    """What the job runs."""

    name: str
    """Name of the job and of its log file."""
    title: str
    """The arguments of `submit`, as a comment in the file."""
    arguments: list[str]
    """Arguments of `python -m qwlit`, quoted for the shell; they may contain shell variables."""
    ranks_by_srun: bool = True
    """True: srun starts one task per device. False: one task, which starts its own processes."""
    array: str | None = None
    """Value of Slurm's --array."""
    before: tuple[str, ...] = ()
    """Shell lines that set the variables used in `arguments`."""


def render(config: RunConfig, job: SlurmJob, *, python: str, folder: Path) -> str:
    """Return the text of the batch file.

    Args:
        python: interpreter with qwlit installed; in a container, `python` is used instead.
        folder: the current folder, which relative paths refer to.

    Raises:
        ConfigError: the settings give no number of devices.
    """
    slurm = config.slurm
    interpreter = "python" if slurm.container else shlex.quote(python)
    container = _container(slurm, folder) if slurm.container else ""
    command = " ".join([interpreter, "-m", "qwlit", *job.arguments])
    lines = [
        "#!/bin/bash",
        f"# Written by: qwlit submit {one_line(job.title)}",
        "# When Slurm preempts it or its time is over, the job is requeued and resumes from its newest checkpoint.",
        *(f"#SBATCH {shlex.quote(option)}" for option in _options(config, job)),
        "",
        "# A failing line before the run ends the job. No -u: users' set-up lines may read variables that are not set.",
        "set -e",
        "# The shell ignores these signals and waits for the run, which saves a checkpoint.",
        "trap : USR2 TERM",
        f"cd {shlex.quote(str(folder))}",
        *slurm.setup,
        *job.before,
        "",
        *NAME_JOB.splitlines(),
        "",
        "# srun starts one rank per device, ends all if one fails, and waits for rank 0, which exports the model."
        if job.ranks_by_srun
        else "# One task, which starts its own processes.",
        # Since Slurm 22.05, srun gives a task only one core unless told otherwise.
        "code=0",
        # After `sbatch --export=NONE`, srun would drop the variables that this file and `slurm.setup` set.
        f'{SRUN} --cpus-per-task="$SLURM_CPUS_PER_TASK"{container} {command} || code=$?',
    ]
    return "\n".join(lines) + "\n" + ASK_FOR_REQUEUE


def _container(slurm: SlurmConfig, folder: Path) -> str:
    """Return Pyxis' options. By default an image sees no host folder and starts in a folder of its own."""
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
            "hardware.devices=auto: a Slurm job needs a number of devices; choose a hardware profile, e.g."
            " hardware=a100x4, or set hardware.devices"
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


def quoted(arguments: list[str]) -> list[str]:
    """Quote each argument for the shell."""
    return [shlex.quote(argument) for argument in arguments]


# sbatch options that the job file sets, and the setting to change instead. SHORT: the options' short forms.
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
    """Refuse sbatch options that the file sets itself, and a time limit that leaves no time to train.

    Raises:
        ConfigError: such an option, with the setting to use instead; or `signal_seconds` reaches the time limit.
    """
    for option in config.options:
        if not re.match(r"--?[A-Za-z]", option):
            raise ConfigError(
                f"slurm.options: '{option}' is not an sbatch option; write --name=value, and quote a value with a comma"
            )
        name = option[2:].partition("=")[0] if option.startswith("--") else SHORT.get(option[1], option[1])
        if name in ALWAYS:
            raise ConfigError(f"slurm.options: --{name} cannot be changed: requeueing depends on it; leave it out")
        if name == "gres" and "gpu" in option:
            name = "gpus"
        if name in OWNED:
            raise ConfigError(f"slurm.options: {option} would be set twice; set {OWNED[name]} instead")
    limit = time_limit_seconds(config.time)
    if limit is not None and limit <= config.signal_seconds:
        raise ConfigError(
            f"slurm.signal_seconds={config.signal_seconds} is not less than slurm.time={config.time} ({limit} s):"
            " the run would have to save as soon as it starts; raise slurm.time"
        )
