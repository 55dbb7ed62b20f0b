"""Plan the steps of a run from data and machine: their number, the schedule, and the steps that validate and save."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qwlit.config.run import RunConfig
from qwlit.data.splits import DataSplit
from qwlit.data.step_plan import Limits, StepPlan
from qwlit.optim.schedules import Schedule
from qwlit.training.config import CheckpointConfig, ValidationConfig
from qwlit.training.milestones import DueSteps, Milestones
from qwlit.training.resilience.rollback import Rollback


@dataclass(frozen=True)
class PlannedSteps:
    """The samples of each step, the schedule, and the steps after which the run validates, saves and logs."""

    step_plan: StepPlan
    schedule: Schedule
    milestones: Milestones

    @property
    def total_steps(self) -> int:
        return self.schedule.total_steps

    def after(self, rollbacks: Sequence[Rollback]) -> "PlannedSteps":
        """Return the steps of a run that has gone back: without the skipped data, at lower learning rates."""
        return replace(
            self,
            step_plan=replace(self.step_plan, skipped_data=tuple(r.skipped_data for r in rollbacks)),
            # The others keep the learning rate, and with it a warm-up that has begun.
            schedule=replace(self.schedule, cuts=tuple(r.lr_cut for r in rollbacks if r.cause == "divergence")),
        )


def build_step_plan(config: RunConfig, data: DataSplit, world_size: int) -> StepPlan:
    """Return the plan that assigns each step's samples to ranks and micro-batches, within the hardware's limits."""
    return StepPlan(
        train=data.train,
        order=data.order(config.seed),
        global_batch_size=config.train.global_batch_size,
        world_size=world_size,
        limits=Limits(*config.hardware.micro_batch_limits),
        packing=config.data.packing,
    )


def plan_steps(config: RunConfig, data: DataSplit, world_size: int) -> PlannedSteps:
    """Plan all steps of the run.

    Raises:
        ConfigError: a sample is longer than hardware.micro_batch_tokens.
    """
    step_plan = build_step_plan(config, data, world_size)
    for samples in (data.train, data.validation):
        if samples is not None:
            step_plan.limits.check(samples)
    epochs = config.train.max_epochs
    schedule = plan_schedule(config, step_plan.steps_of_epochs(epochs) if epochs else None)
    milestones = _milestones(config, step_plan, schedule.total_steps, has_validation=data.validation is not None)
    return PlannedSteps(step_plan, schedule, milestones)


def plan_schedule(config: RunConfig, steps_of_epochs: int | None) -> Schedule:
    """Return the schedule of a run that ends at train.max_steps or after train.max_epochs, whichever is first."""
    ends = [steps for steps in (config.train.max_steps, steps_of_epochs) if steps is not None]
    return Schedule(config.scheduler, min(ends))


def _milestones(config: RunConfig, plan: StepPlan, total_steps: int, *, has_validation: bool) -> Milestones:
    def due_steps(settings: ValidationConfig | CheckpointConfig) -> DueSteps:
        return DueSteps(total_steps, settings.every_steps, plan.next_epoch_end if settings.each_epoch else None)

    validates = has_validation and (config.validation.each_epoch or config.validation.every_steps is not None)
    return Milestones(
        total_steps=total_steps,
        log_every_steps=config.logging.every_steps,
        saving=due_steps(config.checkpoint),
        validation=due_steps(config.validation) if validates else None,
    )
