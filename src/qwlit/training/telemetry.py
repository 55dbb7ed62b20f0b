"""Measure loss, gradient norm, throughput and memory; pass each record to metrics.jsonl and the loggers."""

import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from qwlit.core.batch import StepBatch
from qwlit.core.devices import GIB
from qwlit.core.metric import set_loss_key
from qwlit.model.compile import compile_seconds
from qwlit.model.flops import Flops
from qwlit.training.async_readback import AsyncReadback
from qwlit.training.machine import Machine
from qwlit.training.milestones import Milestones
from qwlit.training.module import CausalLMModule
from qwlit.training.step_gauges import StepGauges

Record = dict[str, float | None]
"""A record of metrics.jsonl, without its step."""
Listener = Callable[[int, Record], None]


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory of the device, GiB; on CPU the peak resident set of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    # ru_maxrss is in KiB on Linux, in bytes on macOS (getrusage(2)).
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


class Telemetry(Callback):
    """Sums losses on the device; at a logged step it copies the sum to the host."""

    def __init__(
        self,
        milestones: Milestones,
        listeners: Sequence[Listener],
        flops: Flops,
        machine: Machine,
        gauges: StepGauges | None = None,
    ) -> None:
        """Create the callback.

        Args:
            listeners: called with every record, beside the Trainer's loggers.
            gauges: measures more for the records of logged steps.
        """
        self._gauges = gauges
        self._milestones = milestones
        self._trainer: Trainer
        self._listeners = listeners
        self._reader: AsyncReadback[tuple[int, Record, tuple[str, ...]]] = AsyncReadback()
        self._loss_sum = torch.zeros((), dtype=torch.float64)
        self._supervised = 0
        self._flops = flops
        # The dense bf16 peak of all devices together, FLOP/s; None: no MFU.
        self._peak_flops = machine.peak_flops and machine.peak_flops * machine.world_size
        self._clock = _Clock()
        self.first_loss: float | None = None
        self.last_loss: float | None = None

    def state_dict(self) -> dict[str, Any]:
        self._write(wait=True)
        return {
            "loss_sum": float(self._loss_sum),
            "supervised": self._supervised,
            "first_loss": self.first_loss,
            "last_loss": self.last_loss,
            "clock": self._clock.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loss_sum.fill_(state_dict["loss_sum"])
        self._supervised = state_dict["supervised"]
        self.first_loss = state_dict["first_loss"]
        self.last_loss = state_dict["last_loss"]
        self._clock.load_state_dict(state_dict["clock"])

    @property
    def tokens_per_second(self) -> float | None:
        return self._clock.overall()

    def setup(self, trainer: Trainer, pl_module: CausalLMModule, stage: str) -> None:
        self._trainer = trainer

    def on_train_start(self, trainer: Trainer, pl_module: CausalLMModule) -> None:
        self._loss_sum = self._loss_sum.to(pl_module.device)
        self._clock.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: CausalLMModule, outputs: Any, batch: StepBatch, batch_idx: int
    ) -> None:
        step = batch.step + 1
        self._loss_sum += pl_module.outcome.loss_sum
        self._supervised += batch.num_supervised_tokens
        flops = self._flops.of(
            num_tokens=batch.num_tokens,
            num_supervised_tokens=batch.num_supervised_tokens,
            num_token_pairs=batch.num_token_pairs,
        )
        self._clock.add(batch.num_tokens, flops)
        if self._milestones.log(step):
            self._measure(pl_module, step)
        self._write(wait=False)

    def _measure(self, module: CausalLMModule, step: int) -> None:
        loss_sum, self._loss_sum = self._loss_sum, torch.zeros_like(self._loss_sum)
        tokens_per_second, flops_per_second = self._clock.lap()
        record: Record = {
            "optim/lr": module.outcome.lr,
            "throughput/tokens_per_second": tokens_per_second,
            "memory/peak_gib": peak_memory_gib(module.device),
        }
        if self._peak_flops and flops_per_second:
            record["throughput/mfu"] = flops_per_second / self._peak_flops
        measured = self._gauges.take() if self._gauges else {}
        values = [loss_sum / self._supervised, module.outcome.grad_norm, *measured.values()]
        # The numbers arrive later; `_write` completes the record with them.
        self._reader.push((step, record, tuple(measured)), torch.stack([value.double() for value in values]))
        self._supervised = 0

    def _write(self, *, wait: bool) -> None:
        for (step, record, names), (loss, grad_norm, *more) in self._reader.pop(wait=wait):
            complete = {"train/loss": loss, "optim/grad_norm": grad_norm, **record}
            complete |= dict(zip(names, more, strict=True))
            self.first_loss = loss if self.first_loss is None else self.first_loss
            self.last_loss = loss
            # Lightning's own `log` would cost 2 to 3 ms, and `state_dict` may not call it.
            self._trainer.callback_metrics.update({"train/loss": torch.tensor(loss)})
            self.record(step, complete)

    def record(self, step: int, record: Record) -> None:
        """Pass a record to metrics.jsonl and the loggers."""
        for listener in self._listeners:
            listener(step, record)
        for logger in self._trainer.loggers:
            logger.log_metrics({name: value for name, value in record.items() if value is not None}, step)

    def on_validation_start(self, trainer: Trainer, pl_module: CausalLMModule) -> None:
        self._clock.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: CausalLMModule) -> None:
        if trainer.sanity_checking:
            return
        if trainer.should_stop and self._supervised:
            # Early stopping ends the run at this step, and the last step is always logged.
            self._measure(pl_module, trainer.global_step)
        self._write(wait=True)
        validation = pl_module.validation
        record: Record = {"val/loss": validation.loss, "val/accuracy": validation.accuracy}
        record |= {set_loss_key(name): loss for name, loss in validation.set_losses.items()}
        self.record(trainer.global_step, record)
        self._clock.resume()

    def on_train_end(self, trainer: Trainer, pl_module: CausalLMModule) -> None:
        self._write(wait=True)


class _Clock:
    """Measures tokens per second of training, without validation, compiling, and the first step, which is slower."""

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0
        self._lap_tokens, self._lap_flops = 0, 0.0
        self._lap_start = self._paused_at = 0.0
        self._warm = False

    def state_dict(self) -> dict[str, float]:
        return {"tokens": self._tokens, "seconds": self._seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._tokens, self._seconds = state["tokens"], state["seconds"]

    def start(self) -> None:
        self._lap_start = _now()

    def add(self, tokens: int, flops: float) -> None:
        if self._warm:
            self._lap_tokens += tokens
            self._lap_flops += flops
        else:
            self._warm = True
            self._lap_start = _now()

    def pause(self) -> None:
        self._paused_at = _now()

    def resume(self) -> None:
        self._lap_start += _now() - self._paused_at

    def lap(self) -> tuple[float | None, float | None]:
        """Return tokens and FLOPs per second since the last call, all ranks; None where nothing was timed yet."""
        now = _now()
        seconds, tokens, flops = now - self._lap_start, self._lap_tokens, self._lap_flops
        self._tokens += tokens
        self._seconds += seconds
        self._lap_start, self._lap_tokens, self._lap_flops = now, 0, 0.0
        return (tokens / seconds, flops / seconds) if tokens else (None, None)

    def overall(self) -> float | None:
        return self._tokens / self._seconds if self._tokens else None


def _now() -> float:
    """Return seconds on a clock that stops while a layer is compiled."""
    return time.perf_counter() - compile_seconds()
