"""Whether this device computes what it should: kernels, a small training, and the tests that need a GPU.

The self-check with which a training begins compares each way of computing that is qwlit's own with plain torch in
float64, here in every precision and with every kernel of attention. The command line trains a small model for five
steps in each way; its losses must be those of `determinism=strict`, which computes in float32 with eager attention and
compiles nothing. The tests are `tests/parity/test_cuda.py`: kernels against plain torch, on small tensors.
"""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.data import common_words
from benchmarks.gpu.tables import COMPARED, Cells, Scale, Tables, agreement, said_how
from benchmarks.gpu.train_once import train_once
from benchmarks.train import largest_difference
from qwlit.model.families import FAMILIES
from qwlit.training.kernel_checks import Place
from qwlit.training.self_check import LIMITS, KernelCheck, checks_for

ROOT = Path(__file__).parents[2]
FILES = ("tests/parity/test_cuda.py",)
WAYS = {
    "full": ["recipe=full_sft"],
    "full, selective": ["recipe=full_sft", "hardware.activation_checkpointing=selective"],
    "full, full": ["recipe=full_sft", "hardware.activation_checkpointing=full"],
    "full, optimizer on the host": ["recipe=full_sft", "hardware.offload_optimizer=true"],
    "LoRA": ["recipe=lora"],
}
KERNELS, TRAININGS, TESTS = "The self-check", "Five steps of a small model", "Tests on this device"


def measure(tables: Tables, scale: Scale) -> None:
    for place in places(scale):
        for check in checks_for(place, attention_dropout=True, fused_adamw=True):
            how = f"{place.model_type}, {str(place.dtype).removeprefix('torch.')}, {place.attention}"
            tables.measure(KERNELS, {"kernel": check.subject, "how": how}, partial(deviation, check, place))
    tables.measure(TESTS, {"test": "all of them"}, lambda: run_tests(tables))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common = common_words(folder, Scale(scale.device, toy=True), "demo", num_samples=40, mean_length=40.0)
        common += ["train.max_steps=5", "train.global_batch_size=8", "hardware.micro_batch_size=4", "optim.lr=1e-3"]
        exact: dict[str, list[float]] = {}
        for way in ("full",) if scale.toy else WAYS:
            tables.measure(TRAININGS, {"way": way}, partial(one, folder, common, way, scale, exact))


def places(scale: Scale) -> Iterator[Place]:
    """Return the ways in which a training may compute on this device."""
    device = torch.device(scale.device)
    for model_type in FAMILIES:
        if scale.device == "cuda":
            yield Place(device, torch.bfloat16, "varlen", model_type)
            yield Place(device, torch.bfloat16, "sdpa", model_type)
            yield Place(device, torch.float32, "eager", model_type)
        yield Place(device, torch.float32, "sdpa", model_type)


def deviation(check: KernelCheck, place: Place) -> Cells:
    """Run one check."""
    return {COMPARED: agreement({"plain torch": check.deviation(place)}, LIMITS[place.dtype])}


def one(folder: Path, common: list[str], way: str, scale: Scale, exact: dict[str, list[float]]) -> Cells:
    """Train in one way, and compare its losses with those of strict.

    Args:
        exact: recipe → losses of strict; completed here.
    """
    recipe, *words = WAYS[way]
    if recipe not in exact:
        strict = [*common, recipe, "dropout=none", "determinism=strict"]
        exact[recipe] = train_once(folder, "strict", strict).losses
    trained = train_once(folder, "run", [*common, recipe, *words, "dropout=none"])
    error = largest_difference(trained.losses, exact[recipe])
    return {"how": said_how(trained.how), COMPARED: agreement({"losses of strict": error}, scale.tolerance)}


class Outcomes:
    """Takes the outcome of every test from pytest."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or (report.when == "setup" and not report.passed):
            reason = ""
            if report.skipped:
                reason = str(report.longrepr[-1]).removeprefix("Skipped: ")
            elif report.failed:
                reason = str(report.longrepr).strip().splitlines()[-1]
            said = f"{report.outcome}: {reason}" if reason else report.outcome
            cells = {"test": report.nodeid.split("::")[-1], "seconds": round(report.duration, 2)}
            self._tables.add(TESTS, cells | {COMPARED: said.replace("|", "/")})


def run_tests(tables: Tables) -> Cells:
    """Run the tests in this process, without the options of the repository's own runs."""
    import pytest

    files = [str(ROOT / file) for file in FILES]
    code = int(pytest.main(["-q", "-o", "addopts=", "-p", "no:cacheprovider", *files], plugins=[Outcomes(tables)]))
    return {COMPARED: f"failed: pytest's exit code {code}" if code else "passed, or skipped as said above"}
