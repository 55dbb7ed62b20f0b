"""Before the first step on CUDA: compare what a run computes in its own way with plain torch, on small tensors.

It takes milliseconds. What has passed is kept in a file, and not checked again on the same kind of device with the same
versions.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from qwlit.core.errors import ConfigError, first_line
from qwlit.core.files import read_json, write_json_atomic
from qwlit.training import kernel_checks
from qwlit.training.kernel_checks import Place
from qwlit.training.resilience.rank_consistency import code_fingerprint

# Assumption: rounding stays below a quarter of these. On CPU in float32 the checks deviate by 1e-6; float32 on CUDA may
# mean TF32, whose relative precision is 2^-11, and bfloat16's is 2^-9.
LIMITS = {torch.float32: 5e-3, torch.float16: 5e-2, torch.bfloat16: 5e-2}
ANOTHER_KERNEL = {
    "varlen": "model.attention=sdpa",
    "sdpa": "model.attention=eager",
    "eager": "hardware.accelerator=cpu",
}


@dataclass(frozen=True)
class KernelCheck:
    """One way of computing that a run uses."""

    subject: str
    remedy: str
    """The setting with which a run computes otherwise."""
    deviation: Callable[[Place], float]
    """Returns the relative deviation from plain torch."""


def checks_for(place: Place, *, attention_dropout: bool, fused_adamw: bool) -> list[KernelCheck]:
    """Return the checks of what a run uses.

    Args:
        fused_adamw: whether the optimizer is AdamW on the device, whose kernel clips and skips.
    """
    precision = "hardware.accelerator=cpu" if place.dtype == torch.float32 else "hardware.precision=32-true"
    another = ANOTHER_KERNEL[place.attention]
    checks = [
        KernelCheck(f"{place.attention} attention", another, kernel_checks.attention),
        KernelCheck("the head", precision, kernel_checks.head),
        KernelCheck("the last layer", precision, kernel_checks.last_layer),
    ]
    if attention_dropout:
        checks.append(
            KernelCheck(f"{place.attention} attention with dropout", another, kernel_checks.attention_dropout)
        )
    if fused_adamw:
        checks.append(KernelCheck("AdamW's skipped step", "optim=paged_adamw", kernel_checks.optimizer))
    return checks


def run_checks(checks: list[KernelCheck], place: Place, device_name: str) -> None:
    """Run the checks.

    Raises:
        ConfigError: one fails, or deviates by more than rounding.
    """
    limit = LIMITS[place.dtype]
    for check in checks:
        try:
            deviation = check.deviation(place)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ConfigError(
                f"self-check: {check.subject} fails on {device_name} ({first_line(error)}); set {check.remedy}"
            ) from error
        if not deviation < limit:
            raise ConfigError(
                f"self-check: {check.subject} on {device_name} deviates from plain torch by {deviation:.2g}, and"
                f" rounding explains at most {limit:g}; set {check.remedy}"
            )


class SelfCheck(Callback):
    """Runs the checks before the first step."""

    def __init__(self, place: Callable[[torch.device], Place], passed_before: Path, **used: bool) -> None:
        """Set up the checks.

        Args:
            place: returns where and how the run computes, given its device.
            passed_before: the file that keeps what has passed.
            used: see `checks_for`.
        """
        self._place, self._passed_before, self._used = place, passed_before, used

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        device = trainer.strategy.root_device
        name = torch.cuda.get_device_name(device)
        check_once(self._place(device), name, self._passed_before, writes=trainer.is_global_zero, **self._used)


def check_once(place: Place, device_name: str, passed_before: Path, *, writes: bool, **used: bool) -> None:
    """Run the checks that have not passed yet with this device and these versions; `writes`: keep which have.

    Raises:
        ConfigError: see `run_checks`.
    """
    passed = read_json(passed_before)
    identity = _identity(device_name)
    known = passed.get(identity)
    keys = {f"{check.subject}, {place.dtype}, {place.model_type}": check for check in checks_for(place, **used)}
    new = {key: check for key, check in keys.items() if not isinstance(known, list) or key not in known}
    run_checks(list(new.values()), place, device_name)
    if new and writes:
        passed[identity] = sorted({*new, *(known if isinstance(known, list) else [])})
        # What cannot be written is checked again at the next start.
        with suppress(OSError):
            passed_before.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomic(passed_before, passed)


def _identity(device_name: str) -> str:
    """Return what decides which kernels run: the device, its driver, torch and qwlit's own code."""
    driver = ""
    with suppress(OSError):
        driver = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").partition("\n")[0]
    return json.dumps([device_name, driver, torch.__version__, code_fingerprint()])
