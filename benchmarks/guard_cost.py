"""What the guard costs: its tests of the state, its telemetry and its probe, as shares of the time of a step.

    python -m benchmarks.guard_cost [hidden=512] [layers=8] [vocabulary=32000] [steps=30] [rounds=2] [tokens=256]

Runs without and with the guard take turns (A B B A). The step is the median over all runs of an arm. What is due only
at some steps is timed by itself: the host waits for the device before and after it. The shares are for the defaults,
a record every 10 steps and a probe every 200, and for the time of a step without the guard.
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
from benchmarks.machine import describe
from qwlit.training.config import GuardConfig, LoggingConfig
from qwlit.training.resilience import probe
from qwlit.training.resilience.state_health import StateHealth
from qwlit.training.step_gauges import StepGauges

RESULTS = Path(__file__).parent / "results"
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


def train(arm: str, options: dict[str, str], folder: str) -> None:
    """Train on the demo's texts with random weights."""
    rows = folder + "/rows.jsonl"
    text = Path(qwlit.__file__).parent.joinpath("resources/demo/val.jsonl").read_text(encoding="utf-8")
    Path(rows).write_text("".join(json.dumps({"text": line * 4}) + "\n" for line in text.splitlines()), "utf-8")
    hidden = int(options.get("hidden", 512))
    words = [
        "model=demo",
        f"model.architecture.hidden_size={hidden}",
        f"model.architecture.intermediate_size={3 * hidden}",
    ]
    words += [f"model.architecture.num_hidden_layers={options.get('layers', 8)}"]
    words += [f"model.architecture.vocab_size={options.get('vocabulary', 32000)}"]
    words += [f"data.path={rows}", f"data.max_seq_len={options.get('tokens', 256)}", "data.exact_match=0"]
    words += [
        "recipe=pretrain",
        "dropout=none",
        f"train.max_steps={options.get('steps', 30)}",
        "hardware.micro_batch_size=16",
    ]
    words += ["data.val_fraction=0", "checkpoint.each_epoch=false", f"run.root={folder}", f"run.name={arm}"]
    words += ["run.overwrite=true", "hardware.compile=false", "logging.every_steps=2"]
    words += ["guard=off"] if arm == "off" else ["guard.probe_every_steps=10"]
    qwlit.train(*words, callbacks=[Steps(arm)])


def main(arguments: list[str]) -> None:
    options = dict(word.split("=", 1) for word in arguments)
    # What is due at a logged step, and the probe.
    StateHealth._test = timed("state", StateHealth._test)  # type: ignore[method-assign]
    StepGauges.on_before_optimizer_step = timed("groups", StepGauges.on_before_optimizer_step)  # type: ignore[method-assign]
    StepGauges._compare = timed("groups", StepGauges._compare)  # type: ignore[method-assign]
    probe.probe = timed("probe", probe.probe)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(int(options.get("rounds", 2))):
            for arm in ("off", "on", "on", "off"):
                train(arm, options, folder)
    step = median(SECONDS["off"])
    every, probe_every = LoggingConfig().every_steps, GuardConfig().probe_every_steps
    assert probe_every
    # Half of the calls of `on_before_optimizer_step` come at steps without a record and cost nothing.
    due = {name: sum(SECONDS[name]) / len(SECONDS["state"]) for name in ("state", "groups")}
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
    print(json.dumps(result, indent=1))
    (RESULTS / "guard_cost.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
