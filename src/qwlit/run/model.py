"""Load the model of a planned run."""

from qwlit.model.loss_model import LossModel, build_loss_model
from qwlit.planning.run_plan import RunPlan


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
