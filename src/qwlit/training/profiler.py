"""`profile.steps=[first,last]`: write a torch trace of these steps into the run folder."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from rich.markup import escape

from qwlit.core.console import console
from qwlit.core.disk import disk_line


class ProfileSteps(Callback):
    """Profiles the steps first … last, counted from 1, and writes a Chrome trace into `profile/`. On rank 0."""

    def __init__(self, steps: tuple[int, int], folder: Path) -> None:
        self._first, self._last = steps
        self._folder = folder
        self._profiler: torch.profiler.profile | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._profiler is None and trainer.global_step + 1 == self._first and trainer.is_global_zero:
            self._profiler = torch.profiler.profile(record_shapes=True, profile_memory=True)
            self._profiler.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step >= self._last:
            self._finish()

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._finish()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        self._finish()

    def _finish(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            file = self._folder / f"steps-{self._first}-{self._last}.json"
            try:
                self._folder.mkdir(exist_ok=True)
                self._profiler.export_chrome_trace(str(file))
            except OSError as error:
                # The training is worth more than its trace.
                console().print(f"  [yellow]note[/]      {escape(disk_line(error))}. The trace is lost")
            self._profiler = None
