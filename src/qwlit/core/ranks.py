"""Which process this is and who started it, known from the environment before any process group exists.

torchrun sets RANK, srun SLURM_PROCID. Lightning's own launcher sets LOCAL_RANK for the processes it starts and leaves
NODE_RANK to the user, so on a further node the first process has NODE_RANK alone.
"""

import ctypes
import os
import signal
import sys


def is_rank_zero() -> bool:
    if "RANK" in os.environ:
        return os.environ["RANK"] == "0"
    # Under srun a LOCAL_RANK can only come from a launcher below it, so it is asked before SLURM_PROCID.
    if "LOCAL_RANK" in os.environ or "NODE_RANK" in os.environ:
        return os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("NODE_RANK", "0") == "0"
    return under_agent() or os.environ.get("SLURM_PROCID", "0") == "0"


_joined_process_group = False


def mark_process_group_joined() -> None:
    """Note that this process has been part of a process group."""
    global _joined_process_group  # noqa: PLW0603 - it is a fact about the process
    _joined_process_group = True


def end_process(code: int) -> int:
    """Return the exit code; where there was a process group, end here and now.

    Gloo's threads can abort a process while the interpreter takes its objects apart ("terminate called without an
    active exception", seen in about one run of twenty under FSDP2), when everything is long written.
    """
    if _joined_process_group:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def rank_label() -> str:
    """Return what to call this process in a message."""
    known = [f"{name} {os.environ[name]}" for name in ("RANK", "NODE_RANK", "LOCAL_RANK") if name in os.environ]
    return ", ".join(known).lower() or f"rank {os.environ.get('SLURM_PROCID', '0')}"


def launched_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def launched_by_srun() -> bool:
    """Whether this is a task of a job step; the batch script itself is none, and neither is what a task starts."""
    return not launched_by_torchrun() and not under_agent() and {"SLURM_NTASKS", "SLURM_STEP_ID"} <= os.environ.keys()


def launched_world_size() -> int | None:
    """Return how many processes torchrun or srun started; None where qwlit starts its own."""
    if launched_by_torchrun():
        return int(os.environ["WORLD_SIZE"])
    return int(os.environ["SLURM_NTASKS"]) if launched_by_srun() else None


def under_agent() -> bool:
    """Whether this is a trial that a W&B agent has started: the agent starts it again, and ends it, by itself."""
    return {"WANDB_SWEEP_ID", "WANDB_RUN_ID"} <= os.environ.keys()


def launch_token() -> str:
    """Return a word that all processes of one launch share."""
    names = ["TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT"]
    names += ["SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"]
    return " ".join(os.environ.get(name, "-") for name in names)


def die_with_parent(parent: int | None = None, number: int = signal.SIGKILL) -> None:
    """End this process when the one that started it does, however that ends (Linux: prctl(2), PR_SET_PDEATHSIG).

    Args:
        parent: that process's number, where it is known: it may have ended before this was asked for.
        number: the signal to end by.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)
        if parent is not None and os.getppid() != parent:
            sys.exit(1)
