"""What a process may ask of the Slurm job that it is part of."""

import os
import re
import shutil
import subprocess
from pathlib import Path

from qwlit.core.ranks import launched_by_torchrun

REQUEUE_FILE = "QWLIT_REQUEUE_FILE"
"""Variable of the batch script's: the file by which a run that cannot ask for its requeue has the script ask."""
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


def torchrun_warning() -> str | None:
    """Return what to say where torchrun would be ended by a signal that it should hand on; None elsewhere."""
    handled = os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", "")
    if job_id() is None or not launched_by_torchrun() or "SIGUSR2" in handled:
        return None
    return (
        "a SIGUSR2 of Slurm's would end torchrun before the run is saved;"
        " torchrun --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2 hands it on; or start with srun"
    )


def has_scontrol() -> bool:
    """Whether Slurm's commands are here; in a container they need not be."""
    return shutil.which("scontrol") is not None


def is_ending_job() -> bool:
    """Whether Slurm itself ends this job: to make room for another, within a time of grace, or at its time limit."""
    facts = _facts()
    preempted = facts.get("PreemptTime", "None") not in ("None", "N/A", "Unknown")
    return (_is_alive(facts) and preempted) or _is_out_of_time(facts)


def requeue_job() -> str | None:
    """Have the job started again as soon as there is room; return why it cannot be, None if it will."""
    facts = _facts()
    if facts and not _is_alive(facts) and not _is_out_of_time(facts):
        # Cancelled in the meantime, or requeued by somebody else already.
        return f"Slurm has it as {facts.get('JobState')}"
    return _scontrol("requeue", str(job_id()))[1]


def leave_requeue_to_script() -> str | None:
    """Leave the requeue to the batch script; return why that cannot be, None if it will."""
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
    """Whether it is being ended at its limit: what it saves now it may still go on from."""
    return facts.get("JobState") == "COMPLETING" and facts.get("Reason") == "TimeLimit"


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
