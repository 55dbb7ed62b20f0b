"""Places for trials that run side by side: which GPUs each sees, or how many of the CPU's cores."""

import os
from typing import Literal

from qwlit.core.errors import ConfigError


def allocate_slots(asked: int | None, devices: int | Literal["auto"], *, word: str) -> list[dict[str, str]]:
    """Return the environment of each place.

    Args:
        asked: how many; None: as many as there are GPUs for, or one on CPU.
        devices: `hardware.devices` of a trial.
        word: what the user calls the number, for the message.

    Raises:
        ConfigError: there are fewer GPUs than that takes.
    """
    gpus = _gpus()
    each = 1 if devices == "auto" else devices
    if not gpus:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        count = asked or 1
        # Every trial would otherwise take all cores, and wait for the others' threads.
        threads = str(max(1, cores // (count * each)))
        alone = count == 1 or "OMP_NUM_THREADS" in os.environ
        return [{} if alone else {"OMP_NUM_THREADS": threads} for _ in range(count)]
    count = asked or len(gpus) // each
    share = len(gpus) // count if count else 0
    if share < each:
        raise ConfigError(
            f"{word}={count or 1} takes {(count or 1) * each} GPUs at hardware.devices={devices},"
            f" and there are {len(gpus)}; lower one of them"
        )
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * share : (i + 1) * share])} for i in range(count)]


def _gpus() -> list[str]:
    """Return the GPUs this process sees, by the names that CUDA_VISIBLE_DEVICES takes."""
    import torch

    number = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:number] if visible else [str(index) for index in range(number)]
