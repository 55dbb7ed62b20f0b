"""Slots for trials that run at the same time: the GPUs that each slot sees, or its number of CPU threads."""

import os
from typing import Literal

from qwlit.core.errors import ConfigError
from qwlit.data.workers import num_cores


def allocate_slots(requested: int | None, devices: int | Literal["auto"], *, option: str) -> list[dict[str, str]]:
    """Return the environment variables of each slot.

    Args:
        requested: number of slots; None: as many as the GPUs allow, or one on CPU.
        devices: `hardware.devices` of a trial.
        option: name of the option that sets `requested`, for the error message.

    Raises:
        ConfigError: there are too few GPUs.
    """
    gpus = _gpus()
    each = 1 if devices == "auto" else devices
    if not gpus:
        count = requested or 1
        # Without this limit each trial starts a thread per core, and the threads of all trials wait for each other.
        threads = str(max(1, num_cores() // (count * each)))
        alone = count == 1 or "OMP_NUM_THREADS" in os.environ
        return [{} if alone else {"OMP_NUM_THREADS": threads} for _ in range(count)]
    count = requested or len(gpus) // each
    share = len(gpus) // count if count else 0
    if share < each:
        raise ConfigError(
            f"{option}={count or 1} takes {(count or 1) * each} GPUs at hardware.devices={devices},"
            f" and there are {len(gpus)}; lower one of them"
        )
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * share : (i + 1) * share])} for i in range(count)]


def _gpus() -> list[str]:
    """Return the GPUs that this process sees, by their names in CUDA_VISIBLE_DEVICES."""
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(index) for index in range(count)]
