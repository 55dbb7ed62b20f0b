"""Build what a Trainer needs from a RunPlan: the model, the LightningModule and the LightningDataModule."""

from collections.abc import Callable

from torch.distributed.device_mesh import DeviceMesh

from qwlit.model.loss_model import LossModel, build_loss_model
from qwlit.planning.run_plan import RunPlan
from qwlit.training.data_module import StepDataModule
from qwlit.training.loss_scale import LossScale
from qwlit.training.module import CausalLMModule
from qwlit.training.resilience.spikes import SpikeDetector
from qwlit.training.telemetry import Telemetry


def load_model(plan: RunPlan, *, leave_empty: bool = False) -> LossModel:
    """Build the model with adapter, dropout and attention, and its weights; `leave_empty`: fill them after sharding."""
    config = plan.config
    return build_loss_model(
        config.model,
        config.adapter,
        config.dropout,
        config.freeze,
        plan.execution,
        seed=config.seed,
        leave_empty=leave_empty,
    )


def build_module(
    plan: RunPlan,
    loss_model: LossModel,
    *,
    shard: Callable[[DeviceMesh], None] | None = None,
    with_telemetry: bool = False,
) -> CausalLMModule:
    """Build the LightningModule.

    Args:
        shard: splits the model under FSDP2, once the process group exists.
        with_telemetry: the module brings the callback that measures and logs; else the Trainer must have it.
    """
    config, machine, data = plan.config, plan.machine, plan.planned_data
    steps = data.steps
    return CausalLMModule(
        loss_model,
        optim=config.optim,
        schedule=steps.schedule,
        max_grad_norm=config.train.max_grad_norm,
        shard=shard,
        loss_scale=LossScale() if machine.precision == "16-mixed" else None,
        seed=config.seed,
        spikes=SpikeDetector() if config.guard.enabled else None,
        offload_optimizer=machine.offload_optimizer,
        reduce_once=machine.reduce_once,
        validation_sets=tuple(data.split.validation_sets),
        callbacks=[Telemetry(steps.milestones, (), plan.flops, machine)] if with_telemetry else [],
    )


def build_data_module(plan: RunPlan) -> StepDataModule:
    """Build the LightningDataModule; it has no validation set where no step validates."""
    data = plan.planned_data
    validates = data.steps.milestones.next_validation(0) is not None
    return StepDataModule(
        data.steps.step_plan,
        [*data.split.validation_sets.values()] if validates else [],
        plan.machine,
        total_steps=data.steps.total_steps,
        pad_id=data.pad_id,
    )
