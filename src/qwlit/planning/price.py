"""What a run's level of memory costs in time, compared with a device that has memory enough."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwlit.planning.run_plan import RunPlan

ADAMW_BYTES = 28
"""Bytes that a step reads and writes per parameter on the host: weight, gradient and two moments in float32 are read,
and all but the gradient written."""
HOST_BANDWIDTH = 100e9
"""Bytes per second that a node's host reads and writes in the step, all devices together. Assumption: half of what
eight channels of DDR4-3200 transfer (204.8 GB/s by the data sheets)."""


@dataclass(frozen=True)
class Price:
    """The time that the level of memory costs; it is not part of the estimated duration."""

    recomputed_share: float
    """FLOPs that activation checkpointing computes again / FLOPs of the step."""
    host_seconds: float
    """Seconds per step in which the host steps and the devices wait; 0 if the devices step."""
    reduces_each_micro_batch: bool
    """Whether the devices exchange gradients after every micro-batch, not once per step."""

    def __str__(self) -> str:
        parts = []
        if self.recomputed_share:
            parts.append(f"layers computed twice, {self.recomputed_share:+.0%} FLOPs")
        if self.host_seconds:
            seconds = f"about {self.host_seconds:.1f}" if self.host_seconds >= 0.05 else "less than 0.1"
            parts.append(f"the optimizer's step on the host, {seconds} s per step")
        if self.reduces_each_micro_batch:
            parts.append("gradients reduced after every micro-batch")
        return "; ".join(parts)


def price_of(plan: "RunPlan") -> Price:
    """Count what the plan's level costs. The host's speed is an assumption."""
    machine = plan.machine
    again = plan.flops.recomputed_per_token if machine.activation_checkpointing in ("full", "offload") else 0.0
    # With FSDP2 each node's devices step a part of the model.
    per_node = plan.setup.num_trainable / machine.num_nodes
    return Price(
        recomputed_share=again / plan.flops_per_token,
        host_seconds=ADAMW_BYTES * per_node / HOST_BANDWIDTH if machine.offload_optimizer else 0.0,
        reduces_each_micro_batch=machine.strategy == "fsdp"
        and plan.batches.largest.accumulates
        and not machine.reduce_once,
    )
