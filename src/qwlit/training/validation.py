"""When the run validates, and when val/loss ends it."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping

from qwlit.training.milestones import Milestones


class ScheduleValidation(Callback):
    """Tells Lightning the absolute number of the next step to validate, which stays correct after a resume."""

    def __init__(self, milestones: Milestones) -> None:
        self.milestones = milestones

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._aim(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._aim(trainer)

    def _aim(self, trainer: Trainer) -> None:
        # After the last validation: a step number that the run does not reach.
        trainer.val_check_batch = (
            self.milestones.next_validation(trainer.global_step) or self.milestones.total_steps + 1
        )


class EarlyStoppingOnValLoss(EarlyStopping):
    """Lightning's early stopping on val/loss; after a resume it keeps the patience of the settings."""

    def __init__(self, patience: int) -> None:
        # With check_finite Lightning would end the run at the first val/loss that is not finite, as if it were done.
        super().__init__("val/loss", patience=patience, check_finite=False)
        self._configured = patience

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.patience = self._configured
