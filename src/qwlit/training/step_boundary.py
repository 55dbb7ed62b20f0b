"""The step boundary: the only point of a step at which the run may be saved or ended."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from qwlit.core.errors import Interrupted
from qwlit.training.milestones import Milestones
from qwlit.training.module import CausalLMModule


class BoundaryCallback(Callback):
    """Calls `on_step_boundary` once per step, after the step's validation where one is due.

    A resume from a checkpoint written before that validation would skip the validation.
    """

    def __init__(self, milestones: Milestones) -> None:
        self.milestones = milestones

    def on_step_boundary(self, trainer: Trainer, module: CausalLMModule, step: int) -> None:
        """Do what is due after `step` steps."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        # Lightning calls this hook before the validation, so on a step with one `on_validation_end` is the boundary.
        if not self.milestones.validate(trainer.global_step):
            self.on_step_boundary(trainer, pl_module, trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.on_step_boundary(trainer, pl_module, trainer.global_step)


STOP_AFTER = "QWLIT_STOP_AFTER_STEPS"
"""Environment variable that `verify` sets: its runs have the schedule of the whole run and stop after these steps."""


class StopAfter(BoundaryCallback):
    """Ends the run after some steps, without saving."""

    def __init__(self, milestones: Milestones, steps: int) -> None:
        super().__init__(milestones)
        self._steps = steps

    def on_step_boundary(self, trainer: Trainer, module: CausalLMModule, step: int) -> None:
        if step >= self._steps:
            raise Interrupted(f"stopped after step {step}, as verify asked")
