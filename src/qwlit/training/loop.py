"""The training loop: the trainer with one callback per concern, in the order in which they must act."""

from dataclasses import dataclass

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping

from qwlit.core.console import console
from qwlit.data.batches import Samples
from qwlit.training.boundary import ScheduleValidation
from qwlit.training.checkpoint import Checkpointing
from qwlit.training.config import CheckpointConfig, GuardConfig, ProfileConfig, ValidationConfig
from qwlit.training.guard import Guard
from qwlit.training.machine import Machine
from qwlit.training.milestones import Milestones
from qwlit.training.preemption import StopOnSignal
from qwlit.training.profiler import ProfileSteps
from qwlit.training.progress import ProgressDisplay
from qwlit.training.run_folder import RunFolder
from qwlit.training.telemetry import Telemetry
from qwlit.training.trainer import build_trainer


@dataclass(frozen=True)
class Loop:
    """The trainer, and the callbacks that know something when it is over."""

    trainer: Trainer
    telemetry: Telemetry
    guard: Guard
    checkpointing: Checkpointing


def build_loop(
    machine: Machine,
    milestones: Milestones,
    folder: RunFolder,
    samples: Samples,
    *,
    guard: GuardConfig,
    validation: ValidationConfig,
    checkpoint: CheckpointConfig,
    profile: ProfileConfig,
) -> Loop:
    display = ProgressDisplay(console(), milestones.total_steps)
    telemetry = Telemetry(milestones, folder, display.show)
    watching = Guard(guard, folder, samples)
    checkpointing = Checkpointing(checkpoint, milestones, folder)
    callbacks: list[Callback] = [watching, telemetry, ScheduleValidation(milestones)]
    if validation.early_stopping_patience is not None and milestones.next_validation(0) is not None:
        # Losses that are not finite are the guard's to judge; here they would end the run as if it were done.
        stopping = EarlyStopping("val/loss", patience=validation.early_stopping_patience, check_finite=False)
        callbacks.append(stopping)
    # Early stopping decides before the boundary's checkpoint is written, and signals are answered after it.
    callbacks += [checkpointing, display]
    if profile.steps is not None:
        callbacks.append(ProfileSteps(profile.steps, folder.path / "profile"))
    callbacks.append(StopOnSignal(milestones, checkpointing, folder))
    trainer = build_trainer(machine, total_steps=milestones.total_steps, callbacks=callbacks, folder=folder.path)
    return Loop(trainer, telemetry, watching, checkpointing)
