"""The guard: read the numbers of each step, and stop the run or let it go back when it is in trouble.

The optimizer skips steps that are not finite and spikes (`spikes.py`); this callback counts them, applies the rules of
`divergence.py`, and takes the alarms of others. All ranks read the same numbers at the same step and decide alike.
"""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from qwlit.core.batch import StepBatch
from qwlit.core.errors import GuardStop
from qwlit.data.samples import Samples
from qwlit.training.async_readback import AsyncReadback
from qwlit.training.checkpointing.checkpoint import Ranks, nonfinite_on_any_rank
from qwlit.training.config import GuardConfig
from qwlit.training.module import CausalLMModule
from qwlit.training.resilience.divergence import DivergenceRules, StepNumbers
from qwlit.training.resilience.rollback import Cause, Health, Rollback, RollbackNeeded
from qwlit.training.tracking.run_folder import RunFolder

SAMPLES_NAMED = 4


class Guard(Callback):
    """Counts skipped steps, and ends the training for a rollback, or for good when no rollback is left."""

    def __init__(
        self,
        config: GuardConfig,
        folder: RunFolder,
        samples: Samples,
        *,
        total_steps: int,
        rollbacks: Sequence[Rollback] = (),
    ) -> None:
        """`rollbacks`: those that the run has behind it."""
        self._config = config
        self._folder = folder
        self._samples = samples
        self.rollbacks = tuple(rollbacks)
        self._module: CausalLMModule
        self._reader: AsyncReadback[tuple[int, tuple[int, ...]]] = AsyncReadback()
        self._rules = DivergenceRules(config.max_nonfinite_steps)
        self._health = Health(total_steps)
        self._sample_ids: tuple[int, ...] = ()
        """Samples of the newest step whose numbers are known."""
        self.skipped_steps = max((rollback.skipped_steps for rollback in rollbacks), default=0)

    def state_dict(self) -> dict[str, Any]:
        # The checkpoint must count the steps whose numbers are still being copied from the device.
        self._judge(wait=True)
        return {
            "skipped_steps": self.skipped_steps,
            "unhealthy": list(self._health.unhealthy),
            "rules": self._rules.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # A rollback that came after this checkpoint has counted more.
        self.skipped_steps = max(self.skipped_steps, state_dict["skipped_steps"])
        self._health.unhealthy.extend(state_dict.get("unhealthy", ()))  # checkpoints of earlier versions lack these
        self._rules.load_state_dict(state_dict.get("rules", {}))

    def on_train_start(self, trainer: Trainer, pl_module: CausalLMModule) -> None:
        self._module = pl_module

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: CausalLMModule, outputs: Any, batch: StepBatch, batch_idx: int
    ) -> None:
        out = pl_module.outcome
        values = torch.stack([out.loss, out.grad_norm, out.skipped, out.nonfinite, out.spike])
        self._reader.push((batch.step + 1, batch.sample_ids), values)
        if batch.step + 1 == self._health.total_steps:
            self._judge_end(batch.step + 1)
        else:
            self._judge(wait=False)

    def on_validation_end(self, trainer: Trainer, pl_module: CausalLMModule) -> None:
        # Early stopping, which comes before, ends the run at this step.
        if trainer.should_stop:
            self._judge_end(trainer.global_step)

    def _judge_end(self, step: int) -> None:
        self._judge(wait=True)
        if self._config.enabled and (trouble := self._rules.trouble_at_end()):
            self.alarm(step, *trouble)

    def _judge(self, *, wait: bool) -> None:
        for (step, sample_ids), (loss, grad_norm, skipped, nonfinite, spike) in self._reader.pop(wait=wait):
            self._sample_ids = sample_ids
            numbers = StepNumbers(step, loss, grad_norm, bool(skipped), bool(nonfinite), bool(spike))
            if skipped:
                self._record_skip(numbers)
            if not self._config.enabled:
                continue
            trouble = self._rules.update(numbers)
            if nonfinite or spike or self._rules.is_suspicious:
                self._health.unhealthy.append(step)
            if trouble:
                self.alarm(step, *trouble)

    def _record_skip(self, numbers: StepNumbers) -> None:
        self.skipped_steps += 1
        if numbers.nonfinite:
            reason = "loss or gradient not finite"
        elif numbers.spike:
            reason = f"gradient norm {numbers.grad_norm:.3g} or loss {numbers.loss:.3g} far above the steps before"
        else:
            reason = "float16 overflow; the loss scale is halved"
        self._folder.append_event(numbers.step, "skip", reason=reason, samples=self._sample_ids)

    def alarm(self, step: int, reason: str, cause: Cause) -> None:
        """Let the run go back because of `reason`; stop it where no rollback is left. Every rank calls it alike.

        Raises:
            RollbackNeeded: the run goes back.
            GuardStop: it has gone back too often.
        """
        names_samples = cause != "divergence"
        if cause != "state":
            # The frozen weights too: only a rollback for the state reads them again.
            everything = self._module.trained_state() | dict(self._module.named_parameters())
            if name := nonfinite_on_any_rank(everything, Ranks.all()):
                reason, cause = f"{name} is not finite", "state"
        if cause == "state" and any((known.from_step, known.reason) == (step, reason) for known in self.rollbacks):
            cause = "divergence"  # no accident damages the same tensor at the same step again
        if cause == "data" and any(rollback.cause != "state" for rollback in self.rollbacks):
            cause = "divergence"  # other data have not helped
        if len(self.rollbacks) >= self._config.max_rollbacks:
            self._folder.append_event(step, "stopped", reason=reason, cause=cause)
            # A damaged state is no step's fault, so no step is diagnosed.
            message = self._last_words(step, reason, cause, names_samples)
            raise GuardStop(message, step=None if cause == "state" else step)
        raise RollbackNeeded(
            step,
            reason,
            cause,
            is_stable=lambda checkpoint: self._health.is_stable(checkpoint, step),
            first_unhealthy=self._health.first_unhealthy(step),
            skipped_steps=self.skipped_steps,
        )

    def needed_checkpoints(self, checkpoints: Sequence[int], step: int) -> set[int]:
        """Return those that a rollback needs: the two newest stable ones, and the next one that may become stable.

        Two, because the disk may damage one.

        Args:
            checkpoints: their steps, ascending.
            step: steps done.
        """
        if not (self._config.enabled and self._config.max_rollbacks):
            return set()
        stable = [saved for saved in checkpoints if self._health.is_stable(saved, step)][-2:]
        later = [saved for saved in checkpoints if saved > max(stable, default=0)]
        hopeful = [saved for saved in later if self._health.may_become_stable(saved)][:1]
        return {*stable, *hopeful}

    def _last_words(self, step: int, reason: str, cause: Cause, names_samples: bool) -> str:
        count = len(self.rollbacks)
        went_back = f" after {count} rollback{'s' * (count > 1)}" if count else ""
        stopped = f"stopped at step {step}{went_back}: {reason}"
        if cause == "state":
            return f"{stopped}; check the memory and the devices of this machine"
        if not names_samples:
            return f"{stopped}; lower optim.lr"
        origins = ", ".join(self._samples.origin(i) for i in self._sample_ids[:SAMPLES_NAMED])
        more = len(self._sample_ids) - SAMPLES_NAMED
        others = f" and {more} more" if more > 0 else ""
        return f"{stopped}. Samples of this step: {origins}{others}. Check these samples, or lower optim.lr"
