"""Whether this device computes what it should: a small training against float32, and the tests that need a GPU.

The command line trains a small model for five steps in each way. Its losses must be those of `determinism=strict`,
which computes in float32 with eager attention and compiles nothing. The tests are `tests/parity/test_cuda.py`: kernels
against plain torch, on small tensors.
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu.data import common_words
from benchmarks.gpu.tables import COMPARED, Cells, Scale, Tables, agreement, said_how
from benchmarks.gpu.train_once import train_once
from benchmarks.train import largest_difference

ROOT = Path(__file__).parents[2]
FILES = ("tests/parity/test_cuda.py",)
WAYS = {
    "full": ["recipe=full_sft"],
    "full, selective": ["recipe=full_sft", "hardware.activation_checkpointing=selective"],
    "full, full": ["recipe=full_sft", "hardware.activation_checkpointing=full"],
    "full, optimizer on the host": ["recipe=full_sft", "hardware.offload_optimizer=true"],
    "LoRA": ["recipe=lora"],
}
TRAININGS, TESTS = "Five steps of a small model", "Tests on this device"


def measure(tables: Tables, scale: Scale) -> None:
    tables.measure(TESTS, {"test": "all of them"}, lambda: run_tests(tables))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common = common_words(folder, Scale(scale.device, toy=True), "demo", num_samples=40, mean_length=40.0)
        common += ["train.max_steps=5", "train.global_batch_size=8", "hardware.micro_batch_size=4", "optim.lr=1e-3"]
        exact: dict[str, list[float]] = {}
        for way in ("full",) if scale.toy else WAYS:
            tables.measure(TRAININGS, {"way": way}, partial(one, folder, common, way, scale, exact))


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
