"""The trainer with its callbacks, in the order in which the callbacks must act."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from qwlit.config.run import recipe_fingerprint, recipe_settings
from qwlit.core.console import console
from qwlit.core.errors import QwlitError
from qwlit.core.files import resolve_path
from qwlit.optim.kinds import OPTIMIZERS
from qwlit.planning.tokenized_data import STORE_FOLDER
from qwlit.run.probe import build_probe
from qwlit.training.checkpointing.saving import Checkpointing
from qwlit.training.checkpointing.writer import CheckpointWriter
from qwlit.training.kernel_checks import Place
from qwlit.training.observed_step import OBSERVE, ObserveSteps
from qwlit.training.profiler import ProfileSteps
from qwlit.training.resilience.growth import SlowDivergence
from qwlit.training.resilience.guard import Guard
from qwlit.training.resilience.hang_watchdog import HangWatchdog
from qwlit.training.resilience.preemption import StopOnSignal
from qwlit.training.resilience.rank_consistency import RankConsistency
from qwlit.training.resilience.rollback import JOURNAL, journal_entry
from qwlit.training.resilience.state_health import StateHealth
from qwlit.training.self_check import SelfCheck
from qwlit.training.step_boundary import STOP_AFTER, StopAfter
from qwlit.training.step_gauges import StepGauges
from qwlit.training.telemetry import Listener, Telemetry, peak_memory_gib
from qwlit.training.tracking.determinism_trace import DeterminismTrace
from qwlit.training.tracking.progress import ProgressDisplay
from qwlit.training.tracking.wandb_run import WandbRun
from qwlit.training.trainer import build_trainer
from qwlit.training.validation import EarlyStoppingOnValLoss, ScheduleValidation

if TYPE_CHECKING:
    from qwlit.run.training_run import TrainingRun


@dataclass(frozen=True)
class TrainerWithCallbacks:
    """The trainer, and the callbacks that hold results after the training."""

    trainer: Trainer
    telemetry: Telemetry
    guard: Guard
    checkpointing: Checkpointing

    def results(self) -> dict[str, float | int | None]:
        """Return the results for summary.json, of the training so far."""
        return {
            "steps": self.trainer.global_step,
            "train_loss_first": self.telemetry.first_loss,
            "train_loss_last": self.telemetry.last_loss,
            "val_loss_best": self.checkpointing.best_val_loss,
            **{f"val_loss_best/{name}": loss for name, loss in self.checkpointing.best_set_losses.items()},
            "tokens_per_second": self.telemetry.tokens_per_second,
            "peak_memory_gib": peak_memory_gib(self.trainer.strategy.root_device),
            "skipped_steps": self.guard.skipped_steps,
            "rollbacks": len(self.guard.rollbacks),
        }


@dataclass(frozen=True)
class Extensions:
    """What the user's program adds to a run."""

    callbacks: Sequence[Callback] = ()
    loggers: Sequence[Logger] = ()


def build_trainer_with_callbacks(
    run: "TrainingRun", wandb_run: WandbRun | None, listeners: Sequence[Listener]
) -> TrainerWithCallbacks:
    """Build the callbacks and the trainer that calls them."""
    config, folder, machine, milestones = run.config, run.folder, run.plan.machine, run.data.steps.milestones
    display = ProgressDisplay(console(), milestones.total_steps)
    listeners = (folder.append_metrics, display.show, *([wandb_run.log] if wandb_run else []), *listeners)
    guard = Guard(
        config.guard,
        folder,
        run.data.split.train,
        total_steps=milestones.total_steps,
        rollbacks=run.rollbacks,
    )
    telemetry, watching = _watching(run, guard, listeners)
    identity = {
        "world_size": machine.world_size,
        "recipe": recipe_fingerprint(config),
        "data": run.data.split.fingerprint,
        JOURNAL: [journal_entry(rollback) for rollback in run.rollbacks],
    }
    writer = CheckpointWriter(copy=run.plan.saves.is_copied)
    on_saved = wandb_run.upload if wandb_run else None
    checkpointing = Checkpointing(
        config.checkpoint,
        milestones,
        folder,
        on_saved,
        identity,
        writer,
        guard.needed_checkpoints,
        partial(guard.alarm, cause="state") if config.guard.enabled else None,
    )
    # Lightning calls the callbacks in this order, on every rank:
    # - early stopping first, because the others must know whether this step is the last;
    # - guard and telemetry before the checkpoint, which holds their state; a step that stops the run is not saved;
    # - the user's callbacks after the checkpoint, so that an error in them loses no step that was due to be saved;
    # - signals last: StopOnSignal saves through `checkpointing` and then ends the run.
    # - before all of them, what only looks at the step: the others may end the run at it; and the check of the kernels,
    #   which may end it before its first step.
    callbacks: list[Callback] = [_self_check(run)] if machine.accelerator == "cuda" else []
    if order := os.environ.get(OBSERVE):
        callbacks.append(ObserveSteps(order))
    patience = config.validation.early_stopping_patience
    if patience is not None and milestones.next_validation(0) is not None:
        callbacks.append(EarlyStoppingOnValLoss(patience))
    callbacks += [guard, *watching, ScheduleValidation(milestones), checkpointing, display]
    if config.determinism != "fast" or config.trace.every_steps:
        callbacks.append(DeterminismTrace(config.trace, milestones.total_steps, folder))
    if steps := os.environ.get(STOP_AFTER):
        callbacks.append(StopAfter(milestones, int(steps)))
    if config.profile.steps is not None:
        callbacks.append(ProfileSteps(config.profile.steps, folder.path / "profile"))
    callbacks += run.extensions.callbacks

    # For the threads that must end the process with os._exit, where no error handler runs any more.
    def record_failure() -> None:
        folder.try_write_summary(status="failed")
        if wandb_run:
            wandb_run.finish(QwlitError.exit_code)

    if machine.world_size > 1:
        callbacks.append(RankConsistency(str(recipe_settings(config)), run.data.split.fingerprint))
        callbacks.append(HangWatchdog(machine.timeout_seconds, record_failure))
    callbacks.append(StopOnSignal(milestones, checkpointing, folder))
    trainer = build_trainer(
        machine,
        total_steps=milestones.total_steps,
        callbacks=callbacks,
        loggers=run.extensions.loggers,
        folder=folder.path,
        writer=writer,
        record_failure=record_failure,
    )
    return TrainerWithCallbacks(trainer, telemetry, guard, checkpointing)


def _self_check(run: "TrainingRun") -> SelfCheck:
    """Return the check of what this run computes in its own way on CUDA."""
    config, machine, attention = run.config, run.plan.machine, run.plan.execution.attention
    return SelfCheck(
        lambda device: Place(device, machine.compute_dtype, attention, run.plan.setup.model.config.model_type),
        resolve_path(config.run.root) / STORE_FOLDER / "self-check.json",
        attention_dropout=config.dropout.attention > 0,
        fused_adamw=OPTIMIZERS[config.optim.name].clips_and_skips and not machine.offload_optimizer,
    )


def _watching(run: "TrainingRun", guard: Guard, listeners: Sequence[Listener]) -> tuple[Telemetry, list[Callback]]:
    """Return Telemetry, and with it the callbacks that raise alarms, in their order."""
    config, machine, milestones = run.config, run.plan.machine, run.data.steps.milestones
    if not config.guard.enabled:
        telemetry = Telemetry(milestones, listeners, run.plan.flops, machine)
        return telemetry, [telemetry]
    growth = SlowDivergence(
        guard,
        is_pretrained=config.model.init == "pretrained",
        vocab_size=run.loss_model.causal_lm.config.vocab_size,
    )
    gauges = StepGauges(milestones, config.train.max_grad_norm)
    telemetry = Telemetry(milestones, (*listeners, growth.read), run.plan.flops, machine, gauges)
    probe = build_probe(run, guard, telemetry)
    # Telemetry reads the gauges. Its state calls the rules before their own state is saved.
    return telemetry, [StateHealth(milestones, guard), gauges, telemetry, *([probe] if probe else []), growth]
