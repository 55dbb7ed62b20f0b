"""What `trace.every_steps=1` costs on top of `determinism=fast`, as a share of the time of a step.

    python -m benchmarks.trace_cost [hidden=256] [layers=4] [vocabulary=8000] [tokens=256] [steps=20] [rounds=1]

Runs without and with the trace take turns (A B B A); the time of a step is the median over all steps of an arm. What
the trace does is timed by itself too, because on a machine with other work the two medians differ by more than 1 %. The
hash of the weights is due every 100 steps (`trace.weights_every_steps`).
"""

import os
import sys
import tempfile
from statistics import median

from benchmarks.guard_cost import SECONDS, timed, train
from benchmarks.machine import describe, keep
from qwlit.training.config import TraceConfig
from qwlit.training.tracking import determinism_trace


def main(arguments: list[str]) -> None:
    options = dict(word.split("=", 1) for word in arguments)
    trace = determinism_trace.DeterminismTrace
    trace.on_train_batch_end = timed("trace", trace.on_train_batch_end)  # type: ignore[method-assign]
    determinism_trace.parameters_hash = timed("hash", determinism_trace.parameters_hash)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(int(options.get("rounds", 1))):
            for arm in ("off", "on", "on", "off"):
                own = [] if arm == "off" else ["trace.every_steps=1"]
                train(arm, options, folder, "guard=off", *own)
    step = median(SECONDS["off"])
    every = TraceConfig().weights_every_steps
    result = {
        "command": f"python -m benchmarks.trace_cost {' '.join(arguments)}".strip(),
        "machine": describe("torch", "lightning", "transformers"),
        "seconds": {
            "step": step,
            "step with the trace": median(SECONDS["on"]),
            "trace of a step": median(SECONDS["trace"]),
            "hash of the weights": median(SECONDS["hash"]),
        },
        "shares": {
            "by the steps, A B B A": median(SECONDS["on"]) / step - 1,
            "trace": median(SECONDS["trace"]) / step,
            "hash": median(SECONDS["hash"]) / every / step,
        },
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }
    keep("trace_cost", result)


if __name__ == "__main__":
    main(sys.argv[1:])
