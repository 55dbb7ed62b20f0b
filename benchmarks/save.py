"""How long the training waits for a save: written in a thread from a copy, against written at once.

    python -m benchmarks.save [parameters=596e6] [rounds=3] [folder=DIR]

The state has the size of AdamW's for so many parameters (default: Qwen3-0.6B), in tensors of 3 million numbers. The two
kinds of save run in turns (A B B A). The first copy also allocates its memory, so it is listed apart.
"""

import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.machine import describe, keep
from qwlit.training.checkpointing.writer import CheckpointWriter

TENSOR = 3_000_000


def state_of(parameters: int) -> dict[str, Any]:
    """Return a checkpoint dictionary with weights and AdamW's two moments."""
    names = [f"loss_model.causal_lm.{index}" for index in range(max(1, parameters // TENSOR))]
    weights = {name: torch.ones(TENSOR) for name in names}
    moments = {i: {key: torch.ones(TENSOR) for key in ("exp_avg", "exp_avg_sq")} for i in range(len(names))}
    optimizer = {"state": moments, "param_groups": [{"params": list(moments)}]}
    return {"state_dict": weights, "optimizer_states": [optimizer], "optimizer_parameters": names, "global_step": 1}


def save(writer: CheckpointWriter, state: dict[str, Any], checkpoint: Path) -> tuple[float, float]:
    """Return the seconds for which the training waits, and those until the checkpoint is on the disk."""
    began = time.perf_counter()
    writer.save_checkpoint(dict(state), checkpoint)
    waited = time.perf_counter() - began
    failure = writer.finish()
    assert failure is None, failure
    written = time.perf_counter() - began
    shutil.rmtree(checkpoint)
    return waited, written


def main(arguments: list[str]) -> None:
    options = dict(word.split("=", 1) for word in arguments)
    state = state_of(round(float(options.get("parameters", 596e6))))
    writers = {"copied": CheckpointWriter(copy=True), "at once": CheckpointWriter(copy=False)}
    with tempfile.TemporaryDirectory(dir=options.get("folder")) as folder:
        checkpoint = Path(folder) / "checkpoints" / "step-000001"
        first, _ = save(writers["copied"], state, checkpoint)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in writers}
        for _ in range(int(options.get("rounds", 3))):
            for name in ("copied", "at once", "at once", "copied"):
                times[name].append(save(writers[name], state, checkpoint))
    num_bytes = 12 * TENSOR * len(state["state_dict"])
    waited = {name: median(pair[0] for pair in pairs) for name, pairs in times.items()}
    result = {
        "command": f"python -m benchmarks.save {' '.join(arguments)}".strip(),
        "machine": describe("torch"),
        "bytes": num_bytes,
        "waited_seconds": waited | {"first copy": first},
        "written_seconds": {name: median(pair[1] for pair in pairs) for name, pairs in times.items()},
        "bytes_per_second_written": num_bytes / median(pair[1] for pair in times["at once"]),
        "ratio": waited["copied"] / waited["at once"],
    }
    keep("save", result)


if __name__ == "__main__":
    main(sys.argv[1:])
