"""Going back to an earlier checkpoint: the journal of decisions, and which checkpoint is stable.

The journal is part of every later checkpoint's manifest. Data and learning rate of a step are pure functions of the
step and the journal, so a resumed run repeats what the run did.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwlit.core.errors import ConfigError, GuardStop
from qwlit.core.files import read_json_lines
from qwlit.data.step_plan import SkippedData
from qwlit.optim.schedules import LearningRateCut
from qwlit.training.tracking.run_folder import RunFolder

STABLE_STEPS = 100
"""A checkpoint is stable after so many steps without a skip and without an alarm: what led to a divergence may be in
the weights before the loss shows it."""
LR_FACTOR, WARMUP_STEPS = 0.5, 20
"""After a rollback for divergence the learning rate is multiplied by the factor, after a warm-up of so many steps."""
EVENT, JOURNAL = "rollback", "rollbacks"
"""The name of the event in events.jsonl, and the key in the checkpoint's manifest."""


class RollbackNeeded(GuardStop):
    """The run must go back. Every rank raises it at the same step; `run.fit` goes back and trains further."""

    def __init__(
        self, step: int, reason: str, *, keeps_recipe: bool, unhealthy: tuple[int, ...], skipped_steps: int
    ) -> None:
        """Args as in `Rollback`; `unhealthy`: the steps that were skipped or raised an alarm."""
        super().__init__(f"stopped at step {step}: {reason}")
        self.step, self.reason, self.keeps_recipe = step, reason, keeps_recipe
        self.unhealthy, self.skipped_steps = unhealthy, skipped_steps

    def allows(self, checkpoint: int) -> bool:
        """Whether the run may go back to the checkpoint of this step."""
        # A checkpoint holds finite values only, so where the state was damaged the newest one will do.
        return checkpoint < self.step and (self.keeps_recipe or is_stable(checkpoint, self.unhealthy, self.step))

    def going_to(self, target: int) -> "Rollback":
        """Return the decision to go back to this step."""
        return Rollback(self.step, target, self.reason, self.keeps_recipe, self.skipped_steps)


@dataclass(frozen=True)
class Rollback:
    """One decision to go back."""

    from_step: int
    """Steps done when it was decided."""
    to_step: int
    """The step of the checkpoint; 0 for the start of the run."""
    reason: str
    keeps_recipe: bool
    """Whether the same samples follow at the same learning rate: the state was damaged, and no sample is to blame."""
    skipped_steps: int
    """Steps that the optimizer skipped, from the start of the run to `from_step`, in all branches."""

    @property
    def skipped_data(self) -> SkippedData:
        return SkippedData(self.to_step, 0 if self.keeps_recipe else self.from_step - self.to_step)

    @property
    def lr_cut(self) -> LearningRateCut:
        factor, warmup = (1.0, 0) if self.keeps_recipe else (LR_FACTOR, WARMUP_STEPS)
        return LearningRateCut(self.to_step, factor, warmup)

    def describe(self, peak_lr: float) -> str:
        """Return a line about what the run does now, `peak_lr` being the peak learning rate from now on."""
        back = f"back to step {self.to_step}" if self.to_step else "back to the start"
        if self.keeps_recipe:
            return f"step {self.from_step}: {self.reason}; {back}, with the same data and learning rate"
        return (
            f"step {self.from_step}: {self.reason}; {back}, without the data of the steps since then, peak learning"
            f" rate {peak_lr:g} after {WARMUP_STEPS} steps of warm-up"
        )


def is_stable(checkpoint: int, unhealthy: Iterable[int], step: int) -> bool:
    """Whether the checkpoint has `STABLE_STEPS` steps behind it, none of which is unhealthy."""
    end = checkpoint + STABLE_STEPS
    return end <= step and not any(checkpoint < bad <= end for bad in unhealthy)


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
    entries = [*manifest.get(JOURNAL, ())]
    # A decision to go back to this very checkpoint came after the checkpoint was written.
    for event in read_json_lines(folder.path / "events.jsonl"):
        if event.get("event") == EVENT and event.get("step") == step:
            entries.append(event.get("decision"))
    found: list[Rollback] = []
    for entry in entries:
        rollback = _checked(entry, folder.path)
        if rollback not in found:
            found.append(rollback)
    return tuple(found)


def _checked(entry: Any, path: Path) -> Rollback:
    try:
        rollback = Rollback(**entry)
        kinds = (int, int, str, bool, int)
        if [type(value) for value in vars(rollback).values()] != [*kinds] or rollback.from_step < rollback.to_step:
            raise ValueError
    except (TypeError, ValueError):
        raise ConfigError(
            f"{path / 'events.jsonl'}: a rollback cannot be read; start again with run.name=… or run.overwrite=true"
        ) from None
    return rollback
