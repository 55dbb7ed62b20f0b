"""The guard: read the numbers of each step, and stop the run or let it go back when it is in trouble.

The optimizer skips steps that are not finite and spikes (`spikes.py`); this callback counts them, applies the rules of
`divergence.py`, and takes the alarms of others. All ranks read the same numbers at the same step and decide alike.
"""

from collections import deque
from collections.abc import Sequence
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
from qwlit.training.resilience.divergence import DivergenceRules, StepNumbers
from qwlit.training.resilience.rollback import STABLE_STEPS, Rollback, RollbackNeeded, is_stable
from qwlit.training.tracking.run_folder import RunFolder

SAMPLES_NAMED = 4
UNHEALTHY_KEPT = 1000
"""Newest unhealthy steps that are remembered; a checkpoint is judged by the 100 steps after it."""


class Guard(Callback):
    """Counts skipped steps, and ends the training for a rollback, or for good when no rollback is left."""

    def __init__(
        self,
        config: GuardConfig,
        folder: RunFolder,
        samples: Samples,
        *,
        total_steps: int,
        rollbacks: Sequence[Rollback],
    ) -> None:
        """`rollbacks`: those that the run has behind it."""
        self._config = config
        self._folder = folder
        self._samples = samples
        self._total_steps = total_steps
        self.rollbacks = tuple(rollbacks)
        self._reader: AsyncReadback[tuple[int, tuple[int, ...]]] = AsyncReadback()
        self._rules = DivergenceRules(config.max_nonfinite_steps)
        self._newest: tuple[int, tuple[int, ...]] = (0, ())
        """Step and samples of the newest numbers."""
        self.skipped_steps = max((rollback.skipped_steps for rollback in rollbacks), default=0)
        self._unhealthy: deque[int] = deque(maxlen=UNHEALTHY_KEPT)

    def state_dict(self) -> dict[str, Any]:
        # The checkpoint must count the steps whose numbers are still being copied from the device.
        self._judge(wait=True)
        return {
            "skipped_steps": self.skipped_steps,
            "unhealthy": list(self._unhealthy),
            "rules": self._rules.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # A rollback that came after this checkpoint has counted more.
        self.skipped_steps = max(self.skipped_steps, state_dict["skipped_steps"])
        self._unhealthy.extend(state_dict.get("unhealthy", ()))  # checkpoints of earlier versions lack these
        self._rules.load_state_dict(state_dict.get("rules", {}))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: CausalLMModule, outputs: Any, batch: StepBatch, batch_idx: int
    ) -> None:
        out = pl_module.outcome
        values = torch.stack([out.loss, out.grad_norm, out.skipped, out.nonfinite, out.spike])
        self._reader.push((batch.step + 1, batch.sample_ids), values)
        self._judge(wait=False)
        if batch.step + 1 == self._total_steps:
            self._judge(wait=True)
            self._judge_end()

    def _judge(self, *, wait: bool) -> None:
        for (step, sample_ids), (loss, grad_norm, skipped, nonfinite, spike) in self._reader.pop(wait=wait):
            self._newest = step, sample_ids
            numbers = StepNumbers(step, loss, grad_norm, bool(skipped), bool(nonfinite), bool(spike))
            if skipped:
                self._record_skip(numbers, sample_ids)
            if self._config.enabled and (reason := self._rules.update(numbers)):
                self.alarm(step, reason)

    def _judge_end(self) -> None:
        if self._config.enabled and (reason := self._rules.ended_above_start()):
            self.alarm(self._total_steps, reason)

    def _record_skip(self, numbers: StepNumbers, sample_ids: tuple[int, ...]) -> None:
        self.skipped_steps += 1
        if numbers.nonfinite:
            reason = "loss or gradient not finite"
        elif numbers.spike:
            reason = f"gradient norm {numbers.grad_norm:.3g} or loss {numbers.loss:.3g} far above the steps before"
        else:
            reason = "float16 overflow; the loss scale is halved"
        if numbers.nonfinite or numbers.spike:
            self._unhealthy.append(numbers.step)
        self._folder.append_event(numbers.step, "skip", reason=reason, samples=sample_ids)

    def alarm(self, step: int, reason: str, *, keeps_recipe: bool = False) -> None:
        """Let the run go back because of `reason`; stop it where no rollback is left. Every rank calls it alike.

        Args:
            keeps_recipe: see `Rollback`.

        Raises:
            RollbackNeeded: the run goes back.
            GuardStop: it has gone back too often.
        """
        self._unhealthy.append(step)
        if len(self.rollbacks) < self._config.max_rollbacks:
            raise RollbackNeeded(
                step,
                reason,
                keeps_recipe=keeps_recipe,
                unhealthy=tuple(self._unhealthy),
                skipped_steps=self.skipped_steps,
            )
        raise GuardStop(self._last_words(step, reason, keeps_recipe=keeps_recipe))

    def damaged(self, step: int, reason: str) -> None:
        """Let the run go back because its weights or moments are damaged. Every rank calls it alike.

        The same damage at the same step again comes from data or learning rate, so the run does not keep these.

        Raises:
            RollbackNeeded, GuardStop: as in `alarm`.
        """
        earlier = {(rollback.from_step, rollback.reason) for rollback in self.rollbacks}
        self.alarm(step, reason, keeps_recipe=(step, reason) not in earlier)

    def needed_checkpoints(self, checkpoints: Sequence[int], step: int) -> set[int]:
        """Return those that a rollback needs: the newest stable one, and the next one that may become stable.

        Args:
            checkpoints: their steps, ascending.
            step: steps done.
        """
        if not (self._config.enabled and self._config.max_rollbacks):
            return set()
        stable = [saved for saved in checkpoints if is_stable(saved, self._unhealthy, step)]
        newest = stable[-1:]
        hopeful = [
            saved
            for saved in checkpoints
            if saved > (newest or [0])[0] and not any(saved < bad <= saved + STABLE_STEPS for bad in self._unhealthy)
        ]
        return {*newest, *hopeful[:1]}

    def _last_words(self, step: int, reason: str, *, keeps_recipe: bool) -> str:
        went_back = f" after {len(self.rollbacks)} rollbacks" if self.rollbacks else ""
        if keeps_recipe:
            return f"stopped at step {step}{went_back}: {reason}; check memory and devices of this machine"
        sample_ids = self._newest[1]
        origins = ", ".join(self._samples.origin(i) for i in sample_ids[:SAMPLES_NAMED])
        more = f" and {len(sample_ids) - SAMPLES_NAMED} more" if len(sample_ids) > SAMPLES_NAMED else ""
        return (
            f"stopped at step {step}{went_back}: {reason}. Samples of this step: {origins}{more}."
            " Lower optim.lr, or check these samples"
        )
