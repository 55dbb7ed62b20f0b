"""Go back to an earlier checkpoint of this run, or to its start, and follow another path from there."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from qwlit.core.console import console
from qwlit.core.ranks import is_rank_zero
from qwlit.run.modules import load_model
from qwlit.run.resume import ResumePoint
from qwlit.training.checkpointing.checkpoint import Ranks
from qwlit.training.checkpointing.folder import POINTERS, delete_checkpoint, list_checkpoints, list_damaged
from qwlit.training.checkpointing.manifest import find_damage, read_manifest, step_of
from qwlit.training.resilience.rollback import Rollback, RollbackNeeded, lr_factor, read_journal, record_decision
from qwlit.training.tracking.run_folder import RunFolder

if TYPE_CHECKING:
    from qwlit.run.training_run import TrainingRun


def rollbacks_before(start: ResumePoint, folder: RunFolder) -> tuple[Rollback, ...]:
    """Return the decisions that hold from this resume point on."""
    return read_journal(folder, start.step, read_manifest(start.checkpoint) if start.checkpoint else {})


def go_back(run: "TrainingRun", needed: RollbackNeeded) -> ResumePoint:
    """Choose where to go back to, record it, and prepare the run for it. Every rank calls it.

    Returns:
        The newest checkpoint that is good and that the guard allows, or the start of the run.

    Raises:
        OSError: rank 0 cannot write; it raises on every rank.
    """
    rollback = Ranks.all().together(lambda: _record(run, needed) if is_rank_zero() else None)[0]
    assert rollback is not None  # rank 0's
    run.follow((*run.rollbacks, rollback))
    has_frozen_weights = not all(weight.requires_grad for weight in run.loss_model.parameters())
    if rollback.to_step == 0 or (rollback.cause == "state" and has_frozen_weights):
        # No checkpoint holds the weights of the start, or frozen ones: build and fill the model again.
        run.loss_model = load_model(run.plan, leave_empty=run.plan.machine.strategy == "fsdp")
    if rollback.to_step == 0:
        return ResumePoint(None)
    checkpoint = next(path for path in list_checkpoints(run.folder) if step_of(path) == rollback.to_step)
    return ResumePoint(checkpoint)


def _newest_good(checkpoints: Sequence[Path]) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that is good, if there is one, and what is wrong with newer ones."""
    damaged: list[str] = []
    for checkpoint in reversed(checkpoints):
        if (reason := find_damage(checkpoint)) is None:
            return checkpoint, damaged
        damaged.append(f"{checkpoint.name} is damaged ({reason})")
    return None, damaged


def _choose(checkpoints: Sequence[Path], needed: RollbackNeeded) -> tuple[Path | None, list[str]]:
    """Return the checkpoint to go back to, None for the start, and what is wrong with those that are passed over."""
    allowed = [checkpoint for checkpoint in checkpoints if needed.allows(step_of(checkpoint))]
    target, damaged = _newest_good(allowed)
    if target is None and damaged:
        # The trouble may be in its weights already, but the start would throw away all that was learned.
        others = [path for path in checkpoints if path not in allowed and needed.is_older(step_of(path))]
        target, damaged_too = _newest_good(others)
        damaged += damaged_too
        if target:
            damaged.append(f"no stable checkpoint is good: {target.name} is the newest good one before the trouble")
    return target, damaged


def _record(run: "TrainingRun", needed: RollbackNeeded) -> Rollback:
    """Delete what is newer than the target, and record the decision. For rank 0.

    The order makes a kill harmless: without the event the run resumes at the target and comes to the same decision. The
    start has no checkpoint to resume from, and a run that lost its checkpoints is refused, so there the event is first.
    """
    folder = run.folder
    checkpoints = list_checkpoints(folder)
    target, damaged = _choose(checkpoints, needed)
    rollback = needed.going_to(step_of(target) if target else 0)
    folder.set_aside_records_after(rollback.to_step, len(run.rollbacks))
    if target is None:
        record_decision(folder, run.rollbacks, rollback)
        folder.write_kept_records()  # or raise, before anything is deleted
        for name in POINTERS:
            (folder.checkpoints / name).unlink(missing_ok=True)
    for checkpoint in (*list_damaged(folder), *checkpoints):
        if step_of(checkpoint) > rollback.to_step:
            delete_checkpoint(checkpoint)
    if target is not None:
        record_decision(folder, run.rollbacks, rollback)
    folder.drop_records_after(rollback.to_step)
    for message in damaged:
        folder.append_event(rollback.to_step, "damaged", message=message)
        console().print(f"  [yellow]note[/]      {escape(message)}")
    peak_lr = run.config.optim.lr * lr_factor((*run.rollbacks, rollback))
    console().print(f"[yellow]rollback[/]  {escape(rollback.describe(peak_lr))}")
    return rollback
