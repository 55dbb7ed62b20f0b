"""What follows from the settings once data and machine are known: steps, warm-up, accumulation, milestones."""

from dataclasses import dataclass

from qwlit.config.run import RunConfig
from qwlit.data.splits import DataSplit
from qwlit.data.step_plan import Limits, StepPlan
from qwlit.optim.schedules import Schedule, build_schedule
from qwlit.training.checkpointing.config import CheckpointConfig
from qwlit.training.config import ValidationConfig
from qwlit.training.milestones import Milestones, Rhythm


@dataclass(frozen=True)
class Derived:
    """Numbers nobody sets."""

    total_steps: int
    schedule: Schedule
    accumulate_grad_batches: int | None
    """Micro-batches per rank and step when only rows are limited; None when nothing limits or tokens do."""
    milestones: Milestones


def limits(config: RunConfig) -> Limits:
    return Limits(rows=config.hardware.micro_batch_size, tokens=config.hardware.micro_batch_tokens)


def plan_steps(config: RunConfig, data: DataSplit, world_size: int) -> StepPlan:
    """Lay out the run's steps for so many ranks."""
    return StepPlan(
        train=data.train,
        order=data.order(config.seed),
        global_batch_size=config.train.global_batch_size,
        world_size=world_size,
        limits=limits(config),
        packing=config.data.packing,
    )


def accumulation(global_batch_size: int, micro_batch_size: int | None, world_size: int) -> int | None:
    """Return ceil(G / (micro_batch_size * world_size)), the micro-batches each rank runs a step."""
    return None if micro_batch_size is None else -(-global_batch_size // (micro_batch_size * world_size))


def derive(config: RunConfig, plan: StepPlan, *, has_validation: bool) -> Derived:
    total_steps = _total_steps(config, plan)
    schedule = build_schedule(config.scheduler, total_steps)
    hardware = config.hardware
    return Derived(
        total_steps=total_steps,
        schedule=schedule,
        accumulate_grad_batches=None
        if hardware.micro_batch_tokens
        else accumulation(plan.global_batch_size, hardware.micro_batch_size, plan.world_size),
        milestones=_milestones(config, plan, total_steps, has_validation=has_validation),
    )


def _total_steps(config: RunConfig, plan: StepPlan) -> int:
    """Whichever of max_steps and max_epochs comes first."""
    train = config.train
    asked = [train.max_steps] if train.max_steps else []
    if train.max_epochs:
        asked.append(plan.steps_of_epochs(train.max_epochs))
    return min(asked)


def _milestones(config: RunConfig, plan: StepPlan, total_steps: int, *, has_validation: bool) -> Milestones:
    def rhythm(settings: ValidationConfig | CheckpointConfig) -> Rhythm:
        return Rhythm(total_steps, settings.every_steps, plan.next_epoch_end if settings.each_epoch else None)

    validates = has_validation and (config.validation.each_epoch or config.validation.every_steps is not None)
    return Milestones(
        total_steps=total_steps,
        log_every_steps=config.logging.every_steps,
        saving=rhythm(config.checkpoint),
        validation=rhythm(config.validation) if validates else None,
    )
