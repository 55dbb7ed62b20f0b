"""Checkpointing: when a checkpoint is saved, which one is the best, and which are deleted."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from rich.markup import escape

from qwlit.core.console import console
from qwlit.core.disk import disk_line, reason_of_disk, remedy_of
from qwlit.core.errors import ConfigError, GuardStop
from qwlit.core.metric import set_loss_key
from qwlit.core.ranks import is_rank_zero
from qwlit.training.checkpointing.checkpoint import IDENTITY, nonfinite_on_any_rank
from qwlit.training.checkpointing.folder import delete_checkpoint, link_checkpoint, list_checkpoints, newest
from qwlit.training.checkpointing.manifest import SAVED, read_seals, seal_of, step_of
from qwlit.training.checkpointing.writer import CheckpointWriter
from qwlit.training.config import CheckpointConfig
from qwlit.training.milestones import Milestones
from qwlit.training.module import CausalLMModule
from qwlit.training.step_boundary import BoundaryCallback
from qwlit.training.tracking.run_folder import RunFolder

MAX_FAILED_SAVES = 3
"""So many saves in a row may fail before the run stops."""


class Checkpointing(BoundaryCallback):
    """Saves at due steps, at the best val/loss so far, and on request; keeps the newest checkpoints and the best."""

    def __init__(
        self,
        config: CheckpointConfig,
        milestones: Milestones,
        folder: RunFolder,
        on_saved: Callable[[Path], None] | None = None,
        identity: Mapping[str, Any] | None = None,
        writer: CheckpointWriter | None = None,
        needed: Callable[[Sequence[int], int], set[int]] = lambda checkpoints, step: set(),
        on_damage: Callable[[int, str], None] | None = None,
    ) -> None:
        """Create the callback.

        Args:
            needed: of the checkpoints' steps, those that must be kept beside the newest and the best; it also gets the
                number of steps done.
            on_damage: called instead of a save, with the step and what is wrong; it must raise. Every rank calls it.
            on_saved: called on rank 0 with every new checkpoint, before older ones are deleted.
            identity: what the manifest says of the run: its world size, recipe and data.
            writer: the writer that the trainer's strategy uses.
        """
        super().__init__(milestones)
        self._keep_last = config.keep_last
        self._on_saved = on_saved
        self._folder = folder
        self._identity = dict(identity or {})
        self._writer = writer or CheckpointWriter()
        self._needed = needed
        self._on_damage = on_damage
        self._begun_step: int | None = None
        """The step of the save that is being written."""
        self._resumed_step: int | None = None
        """The step of the checkpoint that is loaded."""
        self._saved_step = 0
        self._num_failed = 0
        self._seals: dict[int, str | None] = {}
        """Step → seal of the checkpoints that events.jsonl has or should have. Others are not the run's."""
        self._remedy = ""
        """What the last failed save needs."""
        self.has_begun = False
        """Whether the training has begun: the checkpoint at which it resumes is loaded."""
        self.best_val_loss: float | None = None
        self.best_step: int | None = None
        self.best_set_losses: dict[str, float] = {}
        """The loss of each named validation set at `best_step`."""
        self._best_before: tuple[float | None, int | None, dict[str, float]] = (None, None, {})
        """The best before the save that is being written."""
        self._stopped_early = False

    def state_dict(self) -> dict[str, Any]:
        return {
            "best_val_loss": self.best_val_loss,
            "best_step": self.best_step,
            "best_set_losses": self.best_set_losses,
            "stopped_early": self._stopped_early,
            "kept_records": self._folder.kept_records,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_val_loss = state_dict["best_val_loss"]
        self.best_step = state_dict["best_step"]
        self.best_set_losses = state_dict.get("best_set_losses", {})  # older checkpoints do not have it
        self._stopped_early = state_dict["stopped_early"]
        if is_rank_zero():
            self._folder.keep_records(state_dict.get("kept_records", {}))
            # A kill after a save and before its pointers leaves the pointers at an older checkpoint.
            self._seals = read_seals(self._folder.path)
            # Where events.jsonl was removed, no checkpoint has a seal, and each one counts.
            for checkpoint in list_checkpoints(self._folder)[-1 if self._seals else 0 :]:
                with suppress(FileNotFoundError):
                    self._seals.setdefault(step_of(checkpoint), seal_of(checkpoint))
            self._record_seals()
            self._point_to_newest_and_best()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint[IDENTITY] = self._identity

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        # Lightning passes over a callback without state, and the run would forget its best loss.
        states = checkpoint["callbacks"]
        if self.state_key not in states or not all(isinstance(state, dict) for state in states.values()):
            raise ValueError("the state of the callbacks is missing")
        self._resumed_step = checkpoint["global_step"]
        # Another number of ranks is allowed. Checkpoints of earlier versions do not say of which run they are.
        for what in ("recipe", "data"):
            if checkpoint[IDENTITY].get(what, self._identity.get(what)) != self._identity.get(what):
                raise ConfigError(
                    f"the newest checkpoint in {self._folder.checkpoints} is of a run with another {what}; move it away"
                    " to resume from the checkpoint before"
                )

    def on_train_start(self, trainer: Trainer, pl_module: CausalLMModule) -> None:
        if self._resumed_step not in (None, trainer.global_step):
            raise ValueError(f"the loops are at step {trainer.global_step}")
        self.has_begun = True
        self._writer.join_ranks(trainer, write_shards=pl_module.is_sharded)
        # A run that was killed after early stopping and before its end must not train further.
        trainer.should_stop = trainer.should_stop or self._stopped_early

    def on_step_boundary(self, trainer: Trainer, module: CausalLMModule, step: int) -> None:
        self._stopped_early = trainer.should_stop
        # A new best loss changes which checkpoints are superfluous, so the save before it must be recorded first.
        if self.milestones.validate(step) or (trainer.world_size == 1 and not self._writer.is_writing):
            self._finish_save()
        improved = self.milestones.validate(step) and self._improved(module, step)
        is_last = trainer.should_stop or step >= self.milestones.total_steps
        # If early stopping ends the run here, this is the last step, which is always saved.
        if improved or self.milestones.save(step) or is_last:
            self.save(trainer, step, wait=is_last)
        if is_last and self._saved_step != step:
            raise ConfigError(f"the last step could not be saved; {self._remedy} and {self._resume_hint}")

    def _improved(self, module: CausalLMModule, step: int) -> bool:
        loss = module.validation.loss
        if not math.isfinite(loss) or (self.best_val_loss is not None and loss >= self.best_val_loss):
            return False
        self._best_before = (self.best_val_loss, self.best_step, self.best_set_losses)
        self.best_val_loss, self.best_step = loss, step
        self.best_set_losses = module.validation.set_losses
        return True

    def save(self, trainer: Trainer, step: int, *, wait: bool = False) -> None:
        """Write the checkpoint of this step, unless it exists; delete those beyond `keep_last`. All ranks call it.

        Args:
            wait: return when it is on the disk; else it is written while the training goes on.

        Raises:
            GuardStop: a weight or a moment is not finite. Where the guard may go back, this is its RollbackNeeded.
            ConfigError: several saves in a row could not be written.
        """
        self._finish_save()
        if step != self._saved_step:
            self._refuse_nonfinite(trainer, step)
            trainer.save_checkpoint(self.path(step))
            self._begun_step = step
            if wait:
                self._finish_save()

    def save_before_exit(self, trainer: Trainer, step: int) -> str:
        """Save this step if it can be saved; return a sentence about where the run resumes. All ranks call it."""
        self.save(trainer, step, wait=True)
        if self._saved_step == step:
            return f"saved {self._folder.path} at step {step}"
        newest = f"step {self._saved_step}" if self._saved_step else "the newest checkpoint, if there is one"
        return f"step {step} could not be saved; {self._folder.path} resumes from {newest}"

    def _refuse_nonfinite(self, trainer: Trainer, step: int) -> None:
        if name := nonfinite_on_any_rank(trainer.lightning_module.trained_state(), self._writer.ranks):
            if self._on_damage is not None:
                self._on_damage(step, f"{name} is not finite")
            raise GuardStop(
                f"stopped at step {step}: {name} is not finite, so this step is not saved; {self._resume_hint},"
                " with guard=default"
            )

    def _finish_save(self) -> None:
        """Wait for the save that was begun, and do what follows it."""
        if self._begun_step is None:
            return
        step, self._begun_step = self._begun_step, None
        failure = self._writer.finish()
        if failure is None:
            self._saved_step, self._num_failed = step, 0
            if is_rank_zero():
                try:
                    self._record(step)
                except OSError as error:
                    # The next save does what is left to do.
                    console().print(f"  [yellow]note[/]      {escape(disk_line(error))}. Step {step} is saved")
            return
        self._num_failed += 1
        if self.best_step == step:
            self.best_val_loss, self.best_step, self.best_set_losses = self._best_before
        self._remedy = remedy_of(failure)
        reason = f"{reason_of_disk(failure)} ({self._folder.checkpoints})"
        message = f"the checkpoint of step {step} could not be written: {reason}"
        if self._num_failed >= MAX_FAILED_SAVES:
            raise ConfigError(
                f"{message}, and {self._num_failed - 1} before it; {self._remedy} and {self._resume_hint}"
            )
        self._folder.append_event(step, "save_failed", message=message)
        if is_rank_zero():
            console().print(f"  [yellow]note[/]      {escape(message)}; {self._remedy}. The training goes on")

    def _record(self, step: int) -> None:
        """Point to the new checkpoint, record it, and delete those that are now superfluous."""
        self._seals[step] = seal_of(self.path(step))
        self._record_seals()
        self._point_to_newest_and_best()
        if self._on_saved is not None:
            self._on_saved(self.path(step))
        checkpoints = list_checkpoints(self._folder)
        kept = {self.best_step, *self._needed([step_of(checkpoint) for checkpoint in checkpoints], step)}
        for old in checkpoints[: -self._keep_last]:
            if step_of(old) not in kept:
                delete_checkpoint(old)

    def _record_seals(self) -> None:
        """Record the seals that events.jsonl lacks: the new one, and all of them if the file was removed."""
        kept = map(json.loads, self._folder.kept_records.get("events.jsonl", ()))
        recorded = {*read_seals(self._folder.path), *(event["step"] for event in kept if event["event"] == SAVED)}
        for step, seal in self._seals.items():
            if step not in recorded and (path := self.path(step)).is_dir():
                relative = str(path.relative_to(self._folder.path))
                self._folder.append_event(step, SAVED, path=relative, manifest=seal)

    def _point_to_newest_and_best(self) -> None:
        if checkpoint := newest(self._folder):
            self._point("last", checkpoint)
        if self.best_step is not None and self.path(self.best_step).is_dir():
            self._point("best", self.path(self.best_step))

    def _point(self, name: str, checkpoint: Path) -> None:
        if problem := link_checkpoint(self._folder, name, checkpoint):
            console().print(f"  [yellow]note[/]      {escape(problem)}")

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._finish_save()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        # All ranks stop for the guard at the same step. After other errors a rank may be gone, and nobody may wait.
        if isinstance(exception, GuardStop) or (
            trainer.world_size == 1 and not isinstance(exception, KeyboardInterrupt)
        ):
            # The error that ends the run is the one to report.
            with suppress(Exception):
                self._finish_save()

    @property
    def _resume_hint(self) -> str:
        if not self._saved_step:
            return "run the same command again"
        return f"run the same command to resume from step {self._saved_step}"

    def replace_best(self, step: int, validation: Mapping[str, Any]) -> None:
        """Make this step the best, because the best checkpoint is damaged.

        Args:
            validation: the record of its validation in metrics.jsonl; empty where it has none.
        """
        self.best_step, self.best_val_loss = step, validation.get("val/loss")
        self.best_set_losses = {name: validation[set_loss_key(name)] for name in self.best_set_losses if validation}
        self._point("best", self.path(step))

    def path(self, step: int) -> Path:
        """Return the folder of the checkpoint of this step."""
        return self._folder.checkpoints / f"step-{step:06d}"
