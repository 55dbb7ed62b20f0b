"""Going back to an earlier checkpoint: the journal of decisions, and which checkpoint is stable.

The journal is part of every later checkpoint's manifest. Data and learning rate of a step are pure functions of the
step and the journal, so a resumed run repeats what the run did.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from qwlit.core.errors import ConfigError, GuardStop
from qwlit.core.files import read_json_lines
from qwlit.data.step_plan import SkippedData
from qwlit.optim.schedules import LearningRateCut
from qwlit.training.checkpointing.manifest import ROLLBACK
from qwlit.training.tracking.run_folder import RunFolder

STABLE_STEPS, FEWEST_STABLE_STEPS, STABLE_SHARE = 100, 10, 0.1
"""A checkpoint is stable after so many healthy steps: what leads to a divergence may be in the weights before the loss
shows it. In runs of less than 1,000 steps a tenth of the run is enough, but at least the second number."""
LR_FACTOR, WARMUP_STEPS = 0.5, 20
"""A rollback for divergence multiplies the learning rate by the factor, after a warm-up of so many steps."""
DATA_MARGIN = 50
"""The run passes over the samples since the checkpoint and those of so many steps more: bad data come in bursts (PaLM
skipped 200 to 500 batches, Chowdhery et al. 2022, section 5.1)."""
JOURNAL = "rollbacks"
"""The key in the checkpoint's manifest."""


Cause = Literal["state", "data", "divergence"]
"""What a rollback has against: a damaged state (the same samples follow, at the same learning rate), samples (other
samples follow), or both samples and learning rate."""


class RollbackNeeded(GuardStop):
    """The run must go back. Every rank raises it at the same step; `run.fit` goes back and trains further."""

    def __init__(
        self,
        step: int,
        reason: str,
        cause: Cause,
        *,
        is_stable: Callable[[int], bool],
        first_unhealthy: int,
        skipped_steps: int,
    ) -> None:
        """Args as in `Rollback`; `is_stable`: whether a step's checkpoint is; `first_unhealthy`: of this trouble."""
        super().__init__(f"stopped at step {step}: {reason}")
        self.from_step, self.reason, self.cause = step, reason, cause
        self._is_stable, self._first_unhealthy, self._skipped_steps = is_stable, first_unhealthy, skipped_steps

    def allows(self, checkpoint: int) -> bool:
        """Whether the run may go back to the checkpoint of this step."""
        # A checkpoint holds finite values only, so where the state was damaged the newest one will do.
        return checkpoint < self.from_step and (self.cause == "state" or self._is_stable(checkpoint))

    def is_older(self, checkpoint: int) -> bool:
        """Whether the checkpoint of this step is older than the trouble."""
        return checkpoint < self._first_unhealthy

    def going_to(self, target: int) -> "Rollback":
        """Return the decision to go back to this step."""
        return Rollback(self.from_step, target, self.reason, self.cause, self._skipped_steps)


@dataclass(frozen=True)
class Rollback:
    """One decision to go back."""

    from_step: int
    """Steps done when it was decided."""
    to_step: int
    """The step of the checkpoint; 0 for the start of the run."""
    reason: str
    cause: Cause
    skipped_steps: int
    """Steps that the optimizer skipped, from the start of the run to `from_step`, in all branches."""

    @property
    def skipped_data(self) -> SkippedData:
        return SkippedData(self.to_step, 0 if self.cause == "state" else self.from_step - self.to_step + DATA_MARGIN)

    @property
    def lr_cut(self) -> LearningRateCut:
        factor, warmup = (LR_FACTOR, WARMUP_STEPS) if self.cause == "divergence" else (1.0, 0)
        return LearningRateCut(self.to_step, factor, warmup)

    def describe(self, peak_lr: float) -> str:
        """Return a line about what the run does now, `peak_lr` being the peak learning rate from now on."""
        back = f"back to step {self.to_step}" if self.to_step else "back to the start"
        data = "the same data" if self.cause == "state" else f"without the data of {self.skipped_data.num_steps} steps"
        cut = f"peak learning rate {peak_lr:g} after {WARMUP_STEPS} steps of warm-up"
        lr = cut if self.cause == "divergence" else "the same learning rate"
        return f"step {self.from_step}: {self.reason}; {back}, {data}, {lr}"


def lr_factor(rollbacks: Sequence[Rollback]) -> float:
    """Return what these decisions together multiply the learning rate by."""
    return math.prod(rollback.lr_cut.factor for rollback in rollbacks)


@dataclass
class Health:
    """Which steps were unhealthy, and so which checkpoints are stable."""

    total_steps: int
    unhealthy: deque[int] = field(default_factory=lambda: deque(maxlen=1000))
    """Newest steps that were skipped or in which a rule saw the loss or the norm too high."""

    @property
    def stable_steps(self) -> int:
        """How many healthy steps make a checkpoint stable."""
        return min(STABLE_STEPS, max(FEWEST_STABLE_STEPS, int(STABLE_SHARE * self.total_steps)))

    def may_become_stable(self, checkpoint: int) -> bool:
        """Whether none of the steps after the checkpoint that decide about it has been unhealthy so far."""
        return not any(checkpoint < bad <= checkpoint + self.stable_steps for bad in self.unhealthy)

    def first_unhealthy(self, step: int) -> int:
        """Return the first unhealthy step among the newest `stable_steps`; this step if all were healthy."""
        return min((bad for bad in self.unhealthy if step - self.stable_steps < bad), default=step)

    def is_stable(self, checkpoint: int, step: int) -> bool:
        """Whether the checkpoint has enough healthy steps behind it when `step` steps are done."""
        return checkpoint + self.stable_steps <= step and self.may_become_stable(checkpoint)


def journal_entry(rollback: Rollback) -> dict[str, Any]:
    """Return the decision as JSON."""
    return asdict(rollback)


def read_journal(folder: RunFolder, step: int, manifest: dict[str, Any]) -> tuple[Rollback, ...]:
    """Return the decisions that hold for a run that resumes at this step.

    Args:
        manifest: of the checkpoint at which it resumes; empty at step 0.

    Raises:
        ConfigError: an entry is not one of ours.
    """
    entries = manifest.get(JOURNAL, [])
    # A decision to go back to this very checkpoint came after the checkpoint was written.
    for event in read_json_lines(folder.path / "events.jsonl"):
        if event.get("event") == ROLLBACK and event.get("step") == step:
            entries = [*(event.get("before") or ()), event.get("decision")]
    return tuple(_checked(entry, folder.path) for entry in entries)


def record_decision(folder: RunFolder, before: Sequence[Rollback], rollback: Rollback) -> None:
    """Write the decision into events.jsonl, with those before it: some are of later steps, and leave the file."""
    journal = {"decision": journal_entry(rollback), "before": [journal_entry(decision) for decision in before]}
    # A kill after the event and before the checkpoints are deleted leads to the same decision again.
    events = read_json_lines(folder.path / "events.jsonl")
    if not any(journal.items() <= event.items() for event in events if event.get("event") == ROLLBACK):
        folder.append_event(rollback.to_step, ROLLBACK, reason=rollback.reason, **journal)


def _checked(entry: Any, path: Path) -> Rollback:
    try:
        rollback = Rollback(**entry)
        kinds = [int, int, str, str, int]
        if [type(value) for value in vars(rollback).values()] != kinds or rollback.from_step < rollback.to_step:
            raise ValueError
        if rollback.cause not in get_args(Cause):
            raise ValueError
    except (TypeError, ValueError):
        raise ConfigError(
            f"{path / 'events.jsonl'}: a rollback cannot be read; start again with run.name=… or run.overwrite=true"
        ) from None
    return rollback
