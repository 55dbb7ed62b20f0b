"""What the guard costs: its tests of the state, its gauges and its probe, as shares of the time of a step.

    python -m benchmarks.guard_cost [hidden=256] [layers=4] [vocabulary=8000] [tokens=256] [steps=20] [rounds=1]

Runs without and with the guard take turns (A B B A); the time of a step is the median over all steps of an arm. What is
due at some steps only is timed by itself, and the host waits for the device before and after it. The shares are for the
default settings, a record every 10 steps and a probe every 200, in the time of a step without the guard.
"""

import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

import qwlit
from benchmarks.machine import describe, keep
from qwlit.training.config import GuardConfig, LoggingConfig
from qwlit.training.resilience import probe
from qwlit.training.resilience.state_health import StateHealth
from qwlit.training.step_gauges import StepGauges

SECONDS: dict[str, list[float]] = defaultdict(list)
"""By what was timed."""


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def timing(*args: Any, **kwargs: Any) -> Any:
        wait()
        began = time.perf_counter()
        result = call(*args, **kwargs)
        wait()
        SECONDS[name].append(time.perf_counter() - began)
        return result

    return timing


class Steps(Callback):
    """Times the steps from the end of the first."""

    def __init__(self, arm: str) -> None:
        self.arm, self.last = arm, 0.0

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        wait()
        now = time.perf_counter()
        if self.last:
            SECONDS[self.arm].append(now - self.last)
        self.last = now


def train(arm: str, options: dict[str, str], folder: str, *own: str) -> None:
    """Train on the demo's texts with random weights, with these overrides."""
    rows = folder + "/rows.jsonl"
    text = Path(qwlit.__file__).parent.joinpath("resources/demo/val.jsonl").read_text(encoding="utf-8")
    Path(rows).write_text("".join(json.dumps({"text": line * 4}) + "\n" for line in text.splitlines()), "utf-8")
    hidden = int(options.get("hidden", 256))
    shape = {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": options.get("layers", 4),
        "vocab_size": options.get("vocabulary", 8000),
    }
    words = ["model=demo", *(f"model.architecture.{name}={value}" for name, value in shape.items())]
    words += [f"data.path={rows}", "data.val_fraction=0", f"data.max_seq_len={options.get('tokens', 256)}"]
    words += ["recipe=pretrain", "dropout=none", f"train.max_steps={options.get('steps', 20)}", "train.max_epochs=null"]
    words += ["checkpoint.each_epoch=false", f"run.root={folder}", f"run.name={arm}", "run.overwrite=true"]
    words += ["hardware.micro_batch_size=16", "hardware.compile=false", "logging.every_steps=2"]
    qwlit.train(*words, *own, callbacks=[Steps(arm)])


def main(arguments: list[str]) -> None:
    options = dict(word.split("=", 1) for word in arguments)
    StateHealth._test = timed("state", StateHealth._test)  # type: ignore[method-assign]
    for part in ("_observe_last_layer", "on_before_optimizer_step", "_measure"):
        setattr(StepGauges, part, timed("gauges", getattr(StepGauges, part)))
    probe.probe = timed("probe", probe.probe)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(int(options.get("rounds", 1))):
            for arm in ("off", "on", "on", "off"):
                train(arm, options, folder, "guard=off" if arm == "off" else "guard.probe_every_steps=10")
    step = median(SECONDS["off"])
    every, probe_every = LoggingConfig().every_steps, GuardConfig().probe_every_steps
    assert probe_every
    # The calls at steps without a record cost nothing.
    due = {name: sum(SECONDS[name]) / len(SECONDS["state"]) for name in ("state", "gauges")}
    result = {
        "command": f"python -m benchmarks.guard_cost {' '.join(arguments)}".strip(),
        "machine": describe("torch", "lightning", "transformers"),
        "seconds": {
            "step": step,
            "step with the guard": median(SECONDS["on"]),
            **due,
            "probe": median(SECONDS["probe"]),
        },
        "shares": {
            **{name: seconds / every / step for name, seconds in due.items()},
            "probe": median(SECONDS["probe"]) / probe_every / step,
        },
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }
    keep("guard_cost", result)


if __name__ == "__main__":
    main(sys.argv[1:])
