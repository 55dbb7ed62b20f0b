"""What a process may ask of the Slurm job that it is part of."""

import os
import subprocess


def was_requeued() -> bool:
    """Whether this job has run before: what it finds of its own name is its own."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")


def in_job() -> bool:
    return "SLURM_JOB_ID" in os.environ


def requeue_job() -> str | None:
    """Have the job started again as soon as there is room; return why it cannot be, None if it will."""
    # The last task of an array has the array's own number: by it all tasks would be requeued.
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return f"scontrol: {error}"
    return (done.stderr.strip() or f"scontrol ended with code {done.returncode}") if done.returncode else None
