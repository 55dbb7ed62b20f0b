"""The progress display: a bar on a terminal, plain lines elsewhere."""

import time
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress

from qwlit.core.console import can_redraw, progress_bar
from qwlit.core.metric import set_of_key
from qwlit.training.telemetry import Record

SHOWN = {
    "train/loss": ("loss", ".4f"),
    "val/loss": ("val", ".4f"),
    "optim/lr": ("lr", ".2e"),
    "optim/grad_norm": ("norm", ".2f"),
    "throughput/tokens_per_second": ("tok/s", ",.0f"),
    "throughput/mfu": ("mfu", ".1%"),
}
# These fit beside a bar in 80 columns.
BAR = ("train/loss", "val/loss", "throughput/tokens_per_second")


class ProgressDisplay(Callback):
    """Shows steps, loss, validation loss, tokens per second and the time left, on rank 0."""

    def __init__(self, console: Console, total_steps: int) -> None:
        self._console = console
        self._total = total_steps
        self._numbers: dict[str, float] = {}
        self._bar: Progress | None = None
        self._started = 0.0
        self._first_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._started, self._first_step = time.perf_counter(), trainer.global_step
        if trainer.is_global_zero and can_redraw(self._console):
            self._bar = progress_bar("step", MofNCompleteColumn(), self._console)
            self._bar.add_task("", total=self._total, completed=trainer.global_step)
            self._bar.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0], completed=trainer.global_step, description=_text(self._numbers, BAR)
            )

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def show(self, step: int, record: Record) -> None:
        """Show the numbers of a logged step or a validation."""
        numbers = {name: value for name, value in record.items() if value is not None}
        self._numbers |= numbers
        # Only the numbers of this step: a reader would take an older loss for the loss of this step. Those of the probe
        # are not shown.
        if self._bar is None and (text := _text(numbers)):
            self._console.print(f"step {step:>6}/{self._total}  {text}  eta {self._eta(step)}", highlight=False)

    def _eta(self, step: int) -> str:
        done = step - self._first_step
        seconds = (time.perf_counter() - self._started) / max(1, done) * (self._total - step)
        return f"{int(seconds // 60)}:{int(seconds % 60):02d}"


def _text(numbers: dict[str, float], names: tuple[str, ...] | None = None) -> str:
    """Write the named numbers; without `names`, those in SHOWN and the losses of validation sets."""
    shown = SHOWN | {key: (escape(name), ".4f") for key in numbers if (name := set_of_key(key))}
    known = ((*shown[name], numbers[name]) for name in names or shown if name in numbers)
    return "  ".join(f"{label} {value:{form}}" for label, form, value in known)
