"""What `determinism=reproducible` costs, and what it gives: each mode trains twice, in fresh processes.

Two runs of one mode get the same seed, samples and settings. The losses of all steps are compared to the bit.
"""

import tempfile
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean

from benchmarks.gpu.data import common_words
from benchmarks.gpu.tables import COMPARED, INVALID, Cells, Scale, Tables, said_how
from benchmarks.gpu.train_once import Trained, train_once
from benchmarks.train import TOLERANCE_BF16, largest_difference

MODES = ("fast", "reproducible")
TABLE = "Qwen3-0.6B, full, mean length 512, 40 % supervised"


def measure(tables: Tables, scale: Scale) -> None:
    steps, warmup, batch, length = (3, 1, 4, 40.0) if scale.toy else (24, 4, 64, 512.0)
    fast: list[Trained] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common = common_words(folder, scale, "qwen3_0_6b", num_samples=steps * batch, mean_length=length)
        common += ["recipe=full_sft", "dropout=none", f"train.max_steps={steps}", "optim.lr=1e-4"]
        common += [f"train.global_batch_size={batch}"]
        for mode in MODES:
            words = [*common, f"determinism={mode}"]
            tables.measure(TABLE, {"determinism": mode}, partial(twice, folder, mode, words, warmup, fast))


def twice(folder: Path, mode: str, words: list[str], warmup: int, fast: list[Trained]) -> Cells:
    """Train twice and return the mode's row; put the runs of the mode `fast` into `fast`."""
    runs = [train_once(folder, f"{mode}-{number}", words, warmup=warmup) for number in (1, 2)]
    row = cells(runs, fast, mode)
    if mode == "fast":
        fast += runs
    return row


def cells(runs: list[Trained], fast: list[Trained], mode: str) -> Cells:
    """Return a mode's row.

    Args:
        fast: the runs of the first mode, empty for that itself.
    """
    speed = mean(run.tokens_per_second for run in runs)
    return {
        "tokens/s": speed,
        "of fast": speed / mean(run.tokens_per_second for run in fast) if fast else None,
        "peak GiB": max(run.peak_gib for run in runs),
        "how": said_how(runs[0].how),
        COMPARED: compared(runs, fast, must_be_equal=mode == "reproducible"),
    }


def compared(runs: list[Trained], fast: list[Trained], *, must_be_equal: bool) -> str:
    """Say whether two runs are equal to the bit, and whether a mode trains as `fast` does."""
    ((first, second),) = pairwise(run.losses for run in runs)
    off = next((step for step, (a, b) in enumerate(zip(first, second, strict=True), 1) if a != b), None)
    if off is None:
        said = f"two runs of {len(first)} steps have the same losses to the bit"
    else:
        furthest = largest_difference(first, second)
        said = f"two runs differ from step {off} on, by up to {furthest:.0e}"
    valid = off is None or not must_be_equal
    if fast:
        between = largest_difference(first, fast[0].losses)
        said += f"; losses of fast to {between:.0e}"
        valid = valid and between < TOLERANCE_BF16
    return said if valid else f"{INVALID}: {said}"
