"""The step boundary: the one moment of a step at which the run may be saved or left."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from qwlit.training.milestones import Milestones
from qwlit.training.module import CausalLMModule


class BoundaryCallback(Callback):
    """Calls `on_step_boundary` once a step, after the step's validation if one is due.

    A checkpoint written before that validation would lose its result on resume, so boundaries wait for it.
    """

    def __init__(self, milestones: Milestones) -> None:
        self.milestones = milestones

    def on_step_boundary(self, trainer: Trainer, module: CausalLMModule, step: int) -> None:
        """Do what is due after `step` steps have been made."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self.milestones.validate(trainer.global_step):
            self.on_step_boundary(trainer, pl_module, trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.on_step_boundary(trainer, pl_module, trainer.global_step)


class ScheduleValidation(Callback):
    """Points Lightning at the next step with a validation due, by its absolute number: it then survives a resume."""

    def __init__(self, milestones: Milestones) -> None:
        self.milestones = milestones

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._aim(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._aim(trainer)

    def _aim(self, trainer: Trainer) -> None:
        # Past the last validation, a number no step reaches.
        trainer.val_check_batch = (
            self.milestones.next_validation(trainer.global_step) or self.milestones.total_steps + 1
        )
