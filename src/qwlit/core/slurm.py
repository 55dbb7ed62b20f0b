"""What a process may ask of the Slurm job that it is part of."""

import os
import re
import shutil
import signal
import subprocess

LEFT_TO_SCRIPT = 128 + signal.SIGUSR2
"""What a process ends with that cannot ask for the requeue itself: the batch script does, as when Python was not
listening yet. It is what a shell says of one that ended by that signal."""
SECONDS = {"days": 86_400, "hours": 3_600, "minutes": 60, "seconds": 1}
# sbatch(1), --time: a lone number is minutes, two are minutes:seconds, but after days they are hours:minutes.
TIME_LIMIT = re.compile(
    r"(?P<days>\d+)-(?P<h>\d{1,2})(:(?P<m>\d{1,2})(:(?P<s>\d{1,2}))?)?"
    r"|(?P<hours>\d+):(?P<min>\d{1,2}):(?P<sec>\d{1,2})"
    r"|(?P<minutes>\d+)(:(?P<seconds>\d{1,2}))?"
)
NO_LIMIT = ("UNLIMITED", "INFINITE")
ALIVE = ("RUNNING", "SIGNALING", "CONFIGURING", "RESIZING")
"""States (`scontrol show job`) of a job that nobody has ended: SIGNALING until Slurm has told all its processes what it
tells this one. A cancelled job is COMPLETING as long as it has processes."""


def time_limit_seconds(text: str) -> int | None:
    """Return the seconds of a limit as `sbatch --time` takes it; None for no limit.

    Raises:
        ValueError: it is none.
    """
    if text.upper() in NO_LIMIT:
        return None
    match = TIME_LIMIT.fullmatch(text)
    if match is None:
        raise ValueError("a time limit as Slurm writes it: minutes, hours:minutes:seconds, days-hours, or UNLIMITED")
    found = {name: int(number) for name, number in match.groupdict().items() if number is not None}
    short = {"h": "hours", "m": "minutes", "s": "seconds", "min": "minutes", "sec": "seconds"}
    return sum(number * SECONDS[short.get(name, name)] for name, number in found.items())


def job_id() -> str | None:
    """Return what Slurm calls this job, None outside of one.

    A task of an array has two numbers: the last one's own is also the whole array's.
    """
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID")


def was_requeued() -> bool:
    """Whether this job has run before."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")


def can_ask() -> bool:
    """Whether Slurm's commands are here; in a container they need not be."""
    return shutil.which("scontrol") is not None


def is_preempted() -> bool:
    """Whether Slurm has told this job to make room for another, and lets it run for a time of grace."""
    facts = _facts()
    return facts.get("JobState") in ALIVE and facts.get("PreemptTime", "None") not in ("None", "N/A", "Unknown")


def requeue_job() -> str | None:
    """Have the job started again as soon as there is room; return why it cannot be, None if it will."""
    state = _facts().get("JobState", "RUNNING")
    if state not in ALIVE:
        # Cancelled in the meantime, or requeued by somebody else already.
        return f"Slurm has it as {state}"
    return _scontrol("requeue", str(job_id()))[1]


def _facts() -> dict[str, str]:
    said, _ = _scontrol("show", "job", "--oneliner", str(job_id()))
    return dict(word.split("=", 1) for word in said.split() if "=" in word)


def _scontrol(*words: str) -> tuple[str, str | None]:
    """Return what scontrol printed, and why it failed."""
    try:
        done = subprocess.run(["scontrol", *words], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return "", f"scontrol: {error}"
    if done.returncode:
        return "", done.stderr.strip() or f"scontrol ended with code {done.returncode}"
    return done.stdout, None
