"""Read and control the Slurm job that this process belongs to."""

import os
import re
import shutil
import subprocess
from pathlib import Path

from qwlit.core.ranks import in_slurm_job, launched_by_torchrun

REQUEUE_FILE = "QWLIT_REQUEUE_FILE"
"""Variable with a file name, set by the batch script. A run without scontrol creates the file; the script requeues."""
# Days and up to three numbers, or one to three numbers: see `time_limit_seconds`.
TIME_LIMIT = re.compile(r"(\d+-\d{1,2}|\d+)(:\d{1,2}){0,2}")
NO_LIMIT = ("UNLIMITED", "INFINITE")
ALIVE = ("RUNNING", "SIGNALING", "CONFIGURING", "RESIZING")
"""States (`scontrol show job`) of a job that nobody has ended. It is SIGNALING while Slurm sends a signal to its
processes. A cancelled job is COMPLETING as long as it has processes."""


def time_limit_seconds(text: str) -> int | None:
    """Convert a time limit of `sbatch --time` to seconds; None for no limit.

    Raises:
        ValueError: the text is not a time limit.
    """
    if text.upper() in NO_LIMIT:
        return None
    if TIME_LIMIT.fullmatch(text) is None:
        raise ValueError("a time limit as Slurm writes it: minutes, hours:minutes:seconds, days-hours, or UNLIMITED")
    days, _, clock = text.rpartition("-")
    numbers = [int(number) for number in clock.split(":")]
    # sbatch(1), --time: one number is minutes and two are minutes:seconds, but after days the first is always hours.
    units = (3_600, 60, 1) if days or len(numbers) == 3 else (60, 1)
    return int(days or 0) * 86_400 + sum(number * unit for number, unit in zip(numbers, units, strict=False))


def job_id() -> str | None:
    """Return Slurm's id of this job, None outside a job.

    For a task of an array it is ARRAY_TASK: the last task's own SLURM_JOB_ID is also the id of the whole array.
    """
    if not in_slurm_job():
        return None
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]


def was_requeued() -> bool:
    """Whether Slurm has requeued this job: it has run before."""
    return in_slurm_job() and os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")


def torchrun_warning() -> str | None:
    """Return a warning where SIGUSR2 would end torchrun instead of reaching the ranks; None elsewhere."""
    handled = os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", "")
    if job_id() is None or not launched_by_torchrun() or "SIGUSR2" in handled:
        return None
    return (
        "a SIGUSR2 from Slurm would end torchrun before the run is saved;"
        " use torchrun --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2, or start with srun"
    )


def has_scontrol() -> bool:
    """Whether the command scontrol is installed here; many containers lack it."""
    return shutil.which("scontrol") is not None


def is_ending_job() -> bool:
    """Whether Slurm itself is ending this job: for another job, with a grace time, or at the job's time limit."""
    facts = _facts()
    preempted = facts.get("PreemptTime", "None") not in ("None", "N/A", "Unknown")
    return (_is_alive(facts) and preempted) or _is_out_of_time(facts)


def requeue_job() -> str | None:
    """Ask Slurm to requeue the job; return why that failed, or None."""
    facts = _facts()
    if facts and not _is_alive(facts) and not _is_out_of_time(facts):
        # Somebody has cancelled or requeued it in the meantime.
        return f"Slurm reports the job as {facts.get('JobState')}"
    return _scontrol("requeue", str(job_id()))[1]


def leave_requeue_to_script() -> str | None:
    """Tell the batch script to requeue the job; return why that failed, or None."""
    file = os.environ.get(REQUEUE_FILE)
    if file is None:
        return "there is no scontrol here"
    try:
        Path(file).touch()
    except OSError as error:
        return f"there is no scontrol here, and {file} cannot be written: {error.strerror}"
    return None


def _is_alive(facts: dict[str, str]) -> bool:
    return facts.get("JobState") in ALIVE


def _is_out_of_time(facts: dict[str, str]) -> bool:
    """Whether Slurm is ending the job at its time limit: it can still be requeued and resume."""
    return facts.get("JobState") == "COMPLETING" and facts.get("Reason") == "TimeLimit"


def _facts() -> dict[str, str]:
    output, _ = _scontrol("show", "job", "--oneliner", str(job_id()))
    return dict(entry.split("=", 1) for entry in output.split() if "=" in entry)


def _scontrol(*arguments: str) -> tuple[str, str | None]:
    """Return scontrol's output, and why it failed, or None."""
    try:
        done = subprocess.run(["scontrol", *arguments], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return "", f"scontrol: {error}"
    if done.returncode:
        return "", done.stderr.strip() or f"scontrol ended with code {done.returncode}"
    return done.stdout, None
