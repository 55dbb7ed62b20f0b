"""The head against plain cross-entropy on CPU: time and memory of forward and backward at Qwen's vocabulary.

    python -m benchmarks.head [rows=2048] [supervised=0.4] [hidden=256] [rounds=5]

The heads (`benchmarks.heads`) run in turns (A B C C B A) in one process for time, and each in a process of its own for
memory. On a GPU: `python -m benchmarks.gpu parts=head`.
"""

import resource
import subprocess
import sys
import time
from statistics import median

import torch

from benchmarks.heads import HEADS, Rows, draw_rows, why_not
from benchmarks.machine import describe, keep

VOCABULARY = 151_936
ARMS = [name for name in ("ours", "plain", "torch_chunked") if why_not(name, "cpu") is None]


def seconds(name: str, rows: Rows) -> float:
    began = time.perf_counter()
    HEADS[name](rows).backward()  # type: ignore[no-untyped-call]
    rows.states.grad = rows.weight.grad = None
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
    shape = int(options.get("rows", 2048)), int(options.get("hidden", 256)), VOCABULARY
    # First: a process begins with the largest size of the one that started it.
    memory = {} if "only" in options else {name: peak_gib(name, arguments) for name in ARMS}
    rows = draw_rows(*shape, float(options.get("supervised", 0.4)), device="cpu", dtype=torch.float32, trained=True)
    if "only" in options:
        before = resident_gib()
        seconds(options["only"], rows)
        print(resident_gib() - before)
        return
    times: dict[str, list[float]] = {name: [] for name in ARMS}
    for name in ARMS:
        seconds(name, rows)
    for _ in range(int(options.get("rounds", 5))):
        for name in ARMS + ARMS[::-1]:
            times[name].append(seconds(name, rows))
    medians = {name: median(found) for name, found in times.items()}
    result = {
        "command": f"python -m benchmarks.head {' '.join(arguments)}".strip(),
        "machine": describe("torch"),
        "median_seconds": medians,
        "peak_gib": memory,
        "time_ratio": {name: medians["ours"] / medians[name] for name in ARMS[1:]},
        "memory_ratio": {name: memory["ours"] / memory[name] for name in ARMS[1:]},
    }
    keep("head_cpu", result)


if __name__ == "__main__":
    main(sys.argv[1:])
