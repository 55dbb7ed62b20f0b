"""The rank of this process and its launcher, read from the environment before any process group exists.

torchrun sets RANK, srun sets SLURM_PROCID. Lightning's own launcher sets LOCAL_RANK for the processes that it starts.
The user sets NODE_RANK, so on every node but the first, the first process has only NODE_RANK. `check_rank_variables`
refuses variables that another program has left behind.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time

from qwlit.core.errors import ConfigError

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE")
ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
"""Host and port at which the ranks meet."""
READY_VARIABLE = "QWLIT_RUN_READY"
"""Rank 0 sets it for the ranks that it starts: its process id, and the path of the run folder, which is ready."""
PROCESS_START = time.time()
"""Seconds since 1970; `__main__` imports this module first."""
NUM_PORTS = 65_536
FIRST_SPECIAL_STEP = 4294967290
"""Slurm numbers the steps that srun starts from 0; higher numbers are the shell of salloc and the batch script."""


def whole_number(name: str) -> int | None:
    """Return an environment variable as a number; None where it is not set.

    Raises:
        ConfigError: it is empty or not a whole number.
    """
    text = os.environ.get(name)
    if text is not None and not (text.isascii() and text.isdecimal()):
        raise ConfigError(f"the environment variable {name}={text!r} is not a whole number; run: unset {name}")
    return None if text is None else int(text)


def check_port() -> None:
    """Raise ConfigError if MASTER_PORT is set and is no port."""
    port = whole_number("MASTER_PORT")
    if port is not None and not 0 < port < NUM_PORTS:
        raise ConfigError(f"the environment variable MASTER_PORT={port} is no port; it must be below {NUM_PORTS:,}")


def check_rank_numbers() -> None:
    """Refuse rank variables that are no numbers. Call it before anything imports Lightning, which reads them then.

    Raises:
        ConfigError: naming the variable.
    """
    for name in (*RANK_VARIABLES, "SLURM_PROCID"):
        whole_number(name)


def forget_rank_variables() -> None:
    """Remove the rank variables: only `train` has ranks, and a trial starts its own."""
    for name in (*RANK_VARIABLES, *ADDRESS):
        os.environ.pop(name, None)


def is_rank_zero() -> bool:
    if "RANK" in os.environ:
        return os.environ["RANK"] == "0"
    # srun does not set LOCAL_RANK. If it is set under srun, a launcher inside the task set it, so check it first.
    if "LOCAL_RANK" in os.environ or "NODE_RANK" in os.environ:
        return os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("NODE_RANK", "0") == "0"
    # Without SLURM_NTASKS, or in a step of one task, this process starts the other ranks.
    is_only_task = not in_slurm_job() or os.environ.get("SLURM_NTASKS", "1") == "1"
    return under_agent() or is_only_task or os.environ.get("SLURM_PROCID", "0") == "0"


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
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    return code


def rank_label() -> str:
    """Return the name of this process for a message."""
    known = [f"{name} {os.environ[name]}" for name in ("RANK", "NODE_RANK", "LOCAL_RANK") if name in os.environ]
    return ", ".join(known).lower() or f"rank {os.environ.get('SLURM_PROCID', '0')}"


def unset_hint() -> str:
    """Return what to do if another program has left the rank variables behind; "" if torchrun or srun has set them."""
    if launched_world_size() is not None:
        return ""
    names = " ".join(name for name in RANK_VARIABLES if name in os.environ)
    return f"; if nothing else starts the other ranks, run: unset {names}"


def launched_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def in_slurm_job() -> bool:
    """Whether this process belongs to a Slurm job; without SLURM_JOB_ID, other SLURM_ variables are leftovers."""
    return bool(os.environ.get("SLURM_JOB_ID"))


def num_slurm_tasks() -> int:
    """Return the number of tasks of the Slurm job or step; 1 outside a job.

    Raises:
        ConfigError: SLURM_NTASKS is no number of tasks.
    """
    tasks = whole_number("SLURM_NTASKS") if in_slurm_job() else None
    if tasks == 0:
        raise ConfigError("the environment variable SLURM_NTASKS=0 is no number of tasks; run: unset SLURM_NTASKS")
    return tasks or 1


def launched_by_srun() -> bool:
    """Whether srun has started this process and the other ranks.

    Not so the batch script, the processes that a task starts, and the shells of salloc and `srun --pty`. A step of one
    task starts its own ranks.
    """
    if launched_by_torchrun() or under_agent() or num_slurm_tasks() == 1:
        return False
    step = whole_number("SLURM_STEP_ID")
    return step is not None and step < FIRST_SPECIAL_STEP and "SLURM_PTY_PORT" not in os.environ


def launched_world_size() -> int | None:
    """Return how many processes torchrun or srun started; None where qwlit starts the processes itself."""
    if launched_by_torchrun():
        return whole_number("WORLD_SIZE")
    return num_slurm_tasks() if launched_by_srun() else None


def check_rank_of_launcher(limits: dict[str, int], setting: str, remedy: str) -> None:
    """Refuse rank variables of torchrun or srun that no rank of this run has: it would wait for the other ranks.

    Args:
        limits: the variables, and the number below which each must be.
        setting: what the limits follow from.

    Raises:
        ConfigError: naming the variable, `setting` and `remedy`.
    """
    for name, limit in limits.items():
        number = whole_number(name)
        if number is None or number >= limit:
            reason = f"{name} is not set" if number is None else f"{name}={number} does not fit {setting}"
            raise ConfigError(f"the environment variable {reason}; {remedy}")


def check_rank_variables(devices: int, num_nodes: int) -> None:
    """Refuse rank variables that do not fit a process of this run: another program has left them behind.

    Where neither torchrun nor srun starts the ranks, either qwlit starts those of its node, or each rank is started by
    hand: with LOCAL_RANK, WORLD_SIZE and the address, as Lightning's launcher does it.

    Raises:
        ConfigError: naming the variables, and how to unset them.
    """
    world_size = devices * num_nodes
    given = {name: number for name in RANK_VARIABLES if (number := whole_number(name)) is not None}
    fitting = {
        "RANK": range(world_size),
        "LOCAL_RANK": range(devices),
        "NODE_RANK": range(num_nodes),
        "GROUP_RANK": range(num_nodes),
        "WORLD_SIZE": (world_size,),
    }
    wrong = [name for name, number in given.items() if number not in fitting[name]]
    by_hand = {"LOCAL_RANK", "WORLD_SIZE"} if given.keys() & {"RANK", "LOCAL_RANK"} and world_size > 1 else set()
    needed = by_hand | ({"NODE_RANK"} if num_nodes > 1 else set())
    missing = [name for name in (*sorted(needed), *ADDRESS) if needed and not os.environ.get(name)]
    if by_hand and not (wrong or missing):
        rank = given.get("NODE_RANK", 0) * devices + given["LOCAL_RANK"]
        wrong = ["RANK"] if given.get("RANK", rank) != rank else []
    setting = f"hardware.devices={devices} x hardware.num_nodes={num_nodes}"
    if wrong or (missing and given):
        named = " ".join(f"{name}={given[name]}" for name in wrong or given)
        reason = f"does not fit {setting}" if wrong else f"names a rank of {world_size}, but {missing[0]} is not set"
        raise ConfigError(
            f"the environment variable {named} {reason}: has another program left it behind? Run: unset"
            f" {' '.join(given)}; or start every rank with torchrun or srun"
        )
    if missing:
        raise ConfigError(
            f"{setting}: start every rank with torchrun or srun, or set {', '.join(missing)} on each node"
        )
    if needed:
        check_port()


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


def started_by_rank_zero() -> bool:
    """Whether qwlit's own launcher has started this process: its parent is rank 0."""
    starter = os.environ.get(READY_VARIABLE, "").partition(" ")[0]
    return not is_rank_zero() and starter == str(os.getppid())


def die_with_launcher() -> None:
    """Ask the kernel to end this process when torchrun ends, or rank 0 if that has started it."""
    if launched_by_torchrun() or started_by_rank_zero():
        die_with_parent(os.getppid())
