"""How fast batches are planned and laid out, tokens a second: a device that computes slower never waits.

    python -m benchmarks.batches [samples=20000] [steps=300] [workers=2]

Log-normal lengths (mean 512), 64 samples a step in micro-batches of 16, packed. `plan` is the layout alone, `collate`
the tensors as well, in the training process; `workers` the same through processes that run ahead, as on CUDA.
`verifying` is the CPU time of `collate` where the blocks of the store are verified, as in the first epoch, ÷ its CPU
time where they have been, as later: one step of each in turns, A B B A.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.machine import describe, keep
from benchmarks.work import draw_lengths
from qwlit.data.batches import StepDataset, train_loader
from qwlit.data.config import DataConfig
from qwlit.data.encoding import RowEncoder
from qwlit.data.order import Order
from qwlit.data.step_plan import Limits, StepPlan
from qwlit.data.store import SampleStore, build_store

VOCABULARY, BATCH, ROWS, MEAN = 151_936, 64, 16, 512.0
EPOCHS = 9


def make_store(folder: Path, num_samples: int) -> SampleStore:
    random = np.random.default_rng(0)
    with (folder / "samples.jsonl").open("w") as handle:
        for length in draw_lengths(random, MEAN, num_samples):
            ids = random.integers(0, VOCABULARY, length).tolist()
            mask = [int(position >= 0.6 * length) for position in range(length)]
            handle.write(json.dumps({"input_ids": ids, "loss_mask": mask}) + "\n")
    return open_store(folder)


def open_store(folder: Path) -> SampleStore:
    encoder = RowEncoder(DataConfig(), VOCABULARY, None, None, None)
    return build_store(str(folder / "samples.jsonl"), encoder, cache_root=folder / "cache")


def plan_of(store: SampleStore) -> StepPlan:
    return StepPlan(store, Order.plain(0, len(store)), BATCH, 1, Limits(max_samples=ROWS), packing=True)


def tokens_per_second(batches: Iterable[tuple[int, Any]]) -> float:
    """Time what comes after the first."""
    counts, began = [], 0.0
    for number, (num_tokens, _) in enumerate(batches):
        if number == 0:
            began = time.perf_counter()
        else:
            counts.append(num_tokens)
    return sum(counts) / (time.perf_counter() - began)


def verifying(folder: Path, num_samples: int, steps: int) -> float:
    """Return CPU time ÷ CPU time, the median of several epochs."""
    ratios = []
    for _ in range(EPOCHS):
        seconds = [0.0, 0.0]
        datasets = []
        for is_verified in (False, True):
            store = open_store(folder)
            if is_verified:
                store.read(list(range(len(store))))
            plan = plan_of(store)
            plan.samples(0)
            datasets.append(StepDataset(store, plan, 0, pad_id=0))
        for step in range(min(steps, num_samples // BATCH)):
            for which in (0, 1) if step % 2 else (1, 0):
                began = time.process_time()
                datasets[which][step]
                seconds[which] += time.process_time() - began
        ratios.append(seconds[0] / seconds[1])
    return median(ratios)


def main(arguments: list[str]) -> None:
    options = {"samples": "20000", "steps": "300", "workers": "2"} | dict(word.split("=", 1) for word in arguments)
    steps = int(options["steps"])
    with tempfile.TemporaryDirectory() as name:
        store = make_store(Path(name), int(options["samples"]))
        plan = plan_of(store)

        def planned() -> Iterable[tuple[int, Any]]:
            for step in range(steps):
                ids = plan.samples(step)
                yield int(store.lengths(ids).sum()), plan.layout(ids)

        def loaded(num_workers: int) -> Iterable[tuple[int, Any]]:
            dataset = StepDataset(store, plan, 0, pad_id=0)
            loader = train_loader(dataset, start_step=0, total_steps=steps, num_workers=num_workers, pin_memory=False)
            return ((batch.num_tokens, batch) for batch in loader)

        ways = {"plan": planned, "collate": lambda: loaded(0), "workers": lambda: loaded(int(options["workers"]))}
        found: dict[str, list[float]] = {way: [] for way in ways}
        for way in (*ways, *reversed(ways), *ways):
            found[way].append(tokens_per_second(ways[way]()))
        overhead = verifying(Path(name), len(store), steps)
    result = {
        "command": " ".join(["python -m benchmarks.batches", *arguments]),
        "machine": describe("torch", "numpy"),
        "tokens_per_second": {way: round(median(figures)) for way, figures in found.items()},
        "verifying": round(overhead, 4),
    }
    keep("batches", result)


if __name__ == "__main__":
    main(sys.argv[1:])
