"""Some steps of qwlit's command line, in a process of its own: `python -m benchmarks.gpu.train_once OUT WORD…`.

It ends after the last step, before a checkpoint and an export would be written. The parts that train with qwlit alone
start it with `train_once`, which returns what it wrote.
"""

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.arms import train_with_clock
from benchmarks.machine import command_line_environment, settings
from qwlit.core.devices import GIB, detect_devices
from qwlit.training.telemetry import peak_memory_gib


@dataclass
class Trained:
    """What a process measured from the end of its warm-up to the end of its last step."""

    losses: list[float] = field(default_factory=list)
    """Of every step, nats per supervised token."""
    seconds: float = 0.0
    steps: int = 0
    """So many were timed."""
    tokens_per_second: float = 0.0
    mfu: float | None = None
    """Model FLOPs (`qwlit.model.flops`) ÷ the device's dense bfloat16 peak."""
    peak_gib: float = 0.0
    """The most that torch had allocated on the GPU; on CPU the process's resident size."""
    reserved_gib: float | None = None
    """The most that torch's allocator had taken from the GPU."""
    planned_gib: float = 0.0
    """What `plan` counts for a training step, without its reserve."""
    reserve_gib: float = 0.0
    """What `plan` adds for the CUDA context and for memory that the allocator cannot use."""
    how: dict[str, Any] = field(default_factory=dict)


class Enough(Exception):
    """The last step has ended."""


class Clock:
    """Follows the steps of a training."""

    def __init__(self, warmup: int, steps: int) -> None:
        self._warmup, self._steps = warmup, steps
        self._losses: list[Tensor] = []
        self._began = 0.0
        self._counts: list[dict[str, float]] = []
        """Of every timed step what `Flops.of` takes. The batches themselves would stay in the device's memory."""
        self.trained = Trained()

    def step(self, module: Any, batch: Any) -> None:
        """Note a step's loss, without waiting for it; raise Enough after the last one."""
        self._losses.append(module.outcome.loss.detach().clone())
        done = len(self._losses)
        if done > self._warmup:
            names = ("num_tokens", "num_supervised_tokens", "num_token_pairs")
            self._counts.append({name: getattr(batch, name) for name in names})
        if done not in (self._warmup, self._steps):
            return
        on_cuda = module.device.type == "cuda"
        if on_cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if done == self._warmup:
            self._began = now
            return
        trained = self.trained
        trained.losses = [float(loss) for loss in self._losses]
        trained.seconds, trained.steps = now - self._began, done - self._warmup
        trained.tokens_per_second = sum(counts["num_tokens"] for counts in self._counts) / trained.seconds
        trained.peak_gib = peak_memory_gib(module.device)
        trained.reserved_gib = torch.cuda.max_memory_reserved() / GIB if on_cuda else None
        raise Enough

    def flops(self, flops: Any) -> float:
        """Return the model FLOPs of the timed steps."""
        return sum(flops.of(**counts) for counts in self._counts)


def main(out: str, warmup: str, *words: str) -> None:
    import qwlit

    steps = next(int(word.partition("=")[2]) for word in reversed(words) if word.startswith("train.max_steps="))
    clock = Clock(int(warmup), steps)
    try:
        train_with_clock(list(words), clock.step)
        raise SystemExit("the training ended before its last step")
    except Enough:
        pass
    trained, plan = clock.trained, qwlit.plan(*words)
    reserve = plan.memory.components["reserve"]
    trained.planned_gib, trained.reserve_gib = (plan.memory.total - reserve) / GIB, reserve / GIB
    peak = detect_devices().peak_flops
    trained.mfu = clock.flops(plan.flops) / trained.seconds / peak if peak else None
    machine, execution = plan.machine, plan.execution
    how = {"precision": machine.precision, "attention": execution.attention, "compiled": execution.compiled}
    how |= {"activation_checkpointing": machine.activation_checkpointing, "on_host": machine.offload_optimizer}
    limits = {"micro_batch_size", "micro_batch_tokens"}
    how |= {key: getattr(plan.config.hardware, key) for key in limits}
    trained.how = how | settings()
    Path(out).write_text(json.dumps(asdict(trained)))


def train_once(folder: Path, name: str, words: list[str], *, warmup: int = 1) -> Trained:
    """Train in a process of its own.

    Args:
        folder: of the run, its output and what it measured.
        name: of the run.
        warmup: so many steps are not timed.

    Raises:
        RuntimeError: the training failed; the message begins with `failed:` and ends as its output does.
    """
    out, log = folder / f"{name}.json", folder / f"{name}.log"
    words = [*words, f"run.root={folder}/runs", f"run.name={name}", "run.overwrite=true"]
    command = [sys.executable, "-m", "benchmarks.gpu.train_once", str(out), str(warmup), *words]
    with log.open("w") as handle:
        environment = command_line_environment()
        done = subprocess.run(command, stdout=handle, stderr=subprocess.STDOUT, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"failed: {log.read_text()[-2000:]}")
    return Trained(**json.loads(out.read_text()))


if __name__ == "__main__":
    main(*sys.argv[1:])
