"""The rank of this process and its launcher, read from the environment before any process group exists.

torchrun sets RANK, srun sets SLURM_PROCID. Lightning's own launcher sets LOCAL_RANK for the processes that it starts.
The user sets NODE_RANK, so on every node but the first, the first process has only NODE_RANK.
"""

import ctypes
import os
import signal
import sys


def is_rank_zero() -> bool:
    if "RANK" in os.environ:
        return os.environ["RANK"] == "0"
    # srun does not set LOCAL_RANK. If it is set under srun, a launcher inside the task set it, so check it first.
    if "LOCAL_RANK" in os.environ or "NODE_RANK" in os.environ:
        return os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("NODE_RANK", "0") == "0"
    return under_agent() or os.environ.get("SLURM_PROCID", "0") == "0"


_joined_process_group = False


def mark_process_group_joined() -> None:
    """Record that this process has joined a process group; `end_process` reads it."""
    global _joined_process_group  # noqa: PLW0603 - it is true of the whole process
    _joined_process_group = True


def end_process(code: int) -> int:
    """Return the exit code; if this process joined a process group, exit at once without the interpreter's shutdown.

    During that shutdown gloo's threads can abort the process ("terminate called without an active exception", seen in
    about one run of twenty under FSDP2), although all files are written.
    """
    if _joined_process_group:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def rank_label() -> str:
    """Return the name of this process for a message."""
    known = [f"{name} {os.environ[name]}" for name in ("RANK", "NODE_RANK", "LOCAL_RANK") if name in os.environ]
    return ", ".join(known).lower() or f"rank {os.environ.get('SLURM_PROCID', '0')}"


def launched_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def launched_by_srun() -> bool:
    """Whether srun started this process: the batch script and the processes that a task starts do not count."""
    return not launched_by_torchrun() and not under_agent() and {"SLURM_NTASKS", "SLURM_STEP_ID"} <= os.environ.keys()


def launched_world_size() -> int | None:
    """Return how many processes torchrun or srun started; None where qwlit starts the processes itself."""
    if launched_by_torchrun():
        return int(os.environ["WORLD_SIZE"])
    return int(os.environ["SLURM_NTASKS"]) if launched_by_srun() else None


def under_agent() -> bool:
    """Whether a W&B agent started this process as a trial; the agent then ends it and starts it again."""
    return {"WANDB_SWEEP_ID", "WANDB_RUN_ID"} <= os.environ.keys()


def launch_token() -> str:
    """Return a string that is the same in all processes of one launch, and different in the next launch."""
    names = ["TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT"]
    names += ["SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"]
    return " ".join(os.environ.get(name, "-") for name in names)


def die_with_parent(parent: int | None = None, signum: int = signal.SIGKILL) -> None:
    """Ask the kernel to end this process when its parent ends, for whatever reason (Linux: prctl(2), PR_SET_PDEATHSIG).

    Args:
        parent: the parent's process id, where it is known.
        signum: the signal that the kernel then sends to this process.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signum)
        # The parent may have ended before the call above.
        if parent is not None and os.getppid() != parent:
            sys.exit(1)
