"""The head against plain cross-entropy: time and memory of forward and backward at Qwen's vocabulary.

    python -m benchmarks.head [rows=2048] [supervised=0.4] [hidden=256] [rounds=5]

Plain means what transformers does: logits of all rows, then cross_entropy that ignores the masked ones. Torch means
torch's own `linear_cross_entropy` (2.13 and later), which computes the rows in chunks. The heads run in turns
(A B C C B A) in one process for time, and each in a process of its own for memory.
"""

import resource
import subprocess
import sys
import time
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import describe, keep
from qwlit.model.head import linear_cross_entropy

VOCABULARY = 151_936


def inputs(rows: int, hidden: int, supervised: float) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    states = torch.randn(rows, hidden, requires_grad=True)
    weight = (torch.randn(VOCABULARY, hidden) * 0.02).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (rows,))
    targets[torch.randperm(rows)[: round((1 - supervised) * rows)]] = -100
    return states, weight, targets


def ours(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    kept = (targets >= 0).nonzero()[:, 0]
    return linear_cross_entropy(states[kept], weight, targets[kept])[0]


def plain(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(states @ weight.T, targets, ignore_index=-100, reduction="sum")


def chunked(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(states, weight, targets, reduction="sum", ignore_index=-100, options=options)


HEADS = {"ours": ours, "plain": plain} | ({"torch": chunked} if hasattr(F, "linear_cross_entropy") else {})


def seconds(name: str, batch: tuple[Tensor, Tensor, Tensor]) -> float:
    began = time.perf_counter()
    HEADS[name](*batch).backward()
    batch[0].grad = batch[1].grad = None
    return time.perf_counter() - began


def peak_gib(name: str, arguments: list[str]) -> float:
    """Return what forward and backward add to a process that holds inputs and weight."""
    out = subprocess.run(
        [sys.executable, "-m", "benchmarks.head", f"only={name}", *arguments], capture_output=True, check=True
    )
    return float(out.stdout)


def resident_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(arguments: list[str]) -> None:
    options = dict(word.split("=", 1) for word in arguments)
    rows, hidden = int(options.get("rows", 2048)), int(options.get("hidden", 256))
    # First: a process begins with the largest size of the one that started it.
    memory = {} if "only" in options else {name: peak_gib(name, arguments) for name in HEADS}
    batch = inputs(rows, hidden, float(options.get("supervised", 0.4)))
    if "only" in options:
        before = resident_gib()
        seconds(options["only"], batch)
        print(resident_gib() - before)
        return
    times: dict[str, list[float]] = {name: [] for name in HEADS}
    order = list(HEADS)
    for name in order:
        seconds(name, batch)
    for _ in range(int(options.get("rounds", 5))):
        for name in order + order[::-1]:
            times[name].append(seconds(name, batch))
    medians = {name: median(found) for name, found in times.items()}
    result = {
        "command": f"python -m benchmarks.head {' '.join(arguments)}".strip(),
        "machine": describe("torch"),
        "median_seconds": medians,
        "peak_gib": memory,
        "time_ratio": {name: medians["ours"] / medians[name] for name in order[1:]},
        "memory_ratio": {name: memory["ours"] / memory[name] for name in order[1:]},
    }
    keep("head_cpu", result)


if __name__ == "__main__":
    main(sys.argv[1:])
