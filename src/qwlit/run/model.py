"""The model of a planned run, with its weights."""

from qwlit.model.loss_model import LossModel, build_loss_model
from qwlit.planning.run_plan import RunPlan


def load_model(plan: RunPlan, *, leave_empty: bool = False) -> LossModel:
    """Load or make the weights, with adapter, dropout and attention as set; `leave_empty` to fill them when sharded."""
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
