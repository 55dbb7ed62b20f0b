"""Stop the run when loss or gradient is not finite in several steps in a row. The optimizer skips such steps."""

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from qwlit.core.batch import StepBatch
from qwlit.core.errors import GuardStop
from qwlit.data.samples import Samples
from qwlit.training.async_readback import AsyncReadback
from qwlit.training.config import GuardConfig
from qwlit.training.module import CausalLMModule
from qwlit.training.tracking.run_folder import RunFolder

SAMPLES_NAMED = 4


class Guard(Callback):
    """Counts skipped steps. All ranks read the same numbers at the same step, so all stop at the same step."""

    def __init__(self, config: GuardConfig, folder: RunFolder, samples: Samples) -> None:
        self._config = config
        self._folder = folder
        self._samples = samples
        self._reader: AsyncReadback[tuple[int, tuple[int, ...]]] = AsyncReadback()
        self.in_a_row = 0
        self.skipped_steps = 0

    def state_dict(self) -> dict[str, Any]:
        # The checkpoint must count the steps whose numbers are still being copied from the device.
        self._judge(wait=True)
        return {"in_a_row": self.in_a_row, "skipped_steps": self.skipped_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.in_a_row = state_dict["in_a_row"]
        self.skipped_steps = state_dict["skipped_steps"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: CausalLMModule, outputs: Any, batch: StepBatch, batch_idx: int
    ) -> None:
        outcome = pl_module.outcome
        self._reader.push((batch.step + 1, batch.sample_ids), torch.stack([outcome.skipped, outcome.nonfinite]))
        self._judge(wait=False)

    def on_train_end(self, trainer: Trainer, pl_module: CausalLMModule) -> None:
        self._judge(wait=True)

    def _judge(self, *, wait: bool) -> None:
        for (step, sample_ids), (skipped, nonfinite) in self._reader.pop(wait=wait):
            self.in_a_row = self.in_a_row + 1 if nonfinite else 0
            if skipped:
                self.skipped_steps += 1
                reason = "loss or gradient not finite" if nonfinite else "float16 overflow; the loss scale is halved"
                self._folder.append_event(step, "skip", reason=reason, samples=sample_ids)
            if self.in_a_row >= self._config.max_nonfinite_steps:
                raise GuardStop(self._diagnosis(step, sample_ids))

    def _diagnosis(self, step: int, sample_ids: tuple[int, ...]) -> str:
        origins = ", ".join(self._samples.origin(i) for i in sample_ids[:SAMPLES_NAMED])
        more = f" and {len(sample_ids) - SAMPLES_NAMED} more" if len(sample_ids) > SAMPLES_NAMED else ""
        return (
            f"stopped at step {step}: loss or gradient not finite {self.in_a_row} times in a row;"
            f" no weight was changed by these steps. Samples of the last skipped step: {origins}{more}."
            " Lower optim.lr, or check these samples"
        )
