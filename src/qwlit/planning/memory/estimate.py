"""Estimate the memory that a training takes on each device."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qwlit.config.run import RunConfig
from qwlit.core.devices import GIB
from qwlit.model.config import Execution
from qwlit.optim.config import OptimConfig
from qwlit.optim.groups import ParameterGroup
from qwlit.optim.kinds import OPTIMIZERS
from qwlit.planning.memory.activations import ActivationBytes, activation_bytes
from qwlit.planning.memory.optimizer import host_bytes, state_bytes, step_bytes
from qwlit.planning.memory.state import (
    LMHeadBytes,
    MicroShape,
    ShardingAndPrecision,
    autocast_bytes,
    embedding_gradient_bytes,
    embedding_gradient_share,
    gradient_bytes,
    lm_head_bytes,
    weight_bytes,
)
from qwlit.planning.memory.unsharded import UnshardedBytes, unsharded_bytes
from qwlit.training.machine import Machine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Assumptions: the CUDA context with cuBLAS's workspaces, and the share that the allocator cannot use.
CONTEXT_BYTES, FRAGMENTED_SHARE = 0.6 * GIB, 0.04
# NCCL's communicator, which DDP and FSDP2 use for all collectives: a ring of 24 channels (assumption) with buffers of
# 10 MiB to receive and of 2 MiB to send (github.com/NVIDIA/nccl, issue 1685).
COMMUNICATOR_BYTES = 24 * 12 * 2**20
# On CPU: the interpreter and its libraries. The demo's measured peak is 0.60 GiB, of which 0.1 GiB is counted below.
PROCESS_BYTES = 0.5 * GIB
OFFLOAD_SHARE = 0.75
"""Of a node's host memory, for the optimizers of its devices; the rest is for processes and page cache. Assumption."""


@dataclass(frozen=True)
class MemoryEstimate:
    """A device's memory in the phase of a step that needs most."""

    phase: str
    components: dict[str, float]
    """Bytes by component, such as weights, gradients and activations."""
    device: float
    """Device memory in bytes; 0 if unknown."""
    host: float = 0.0
    """Bytes of the host's memory that the optimizer takes for this device; 0 if it steps on the device, or on CPU."""
    host_limit: float = 0.0
    """Bytes of the host's memory that it may take for one device; 0 if unknown."""

    @property
    def total(self) -> float:
        return sum(self.components.values())

    @property
    def fits(self) -> bool | None:
        """Whether the training fits; None if the device's memory is unknown."""
        return self.total <= self.device if self.device else None

    @property
    def fits_host(self) -> bool:
        """Whether the optimizer fits into the host's memory, as far as that is known."""
        return not self.host_limit or self.host <= self.host_limit


def estimate_memory(
    config: RunConfig,
    model: "PreTrainedModel",
    groups: list[ParameterGroup],
    machine: Machine,
    execution: Execution,
    micro: MicroShape,
) -> MemoryEstimate:
    """Count a device's memory in the phases of a step in which it can peak, and return the largest count.

    Args:
        model: on the meta device, with its adapters and frozen parameters.
        micro: the micro-batch that takes the most memory.
    """
    sharding = sharding_and_precision(machine)
    on_cpu = machine.accelerator == "cpu"
    head = lm_head_bytes(model, execution.frozen_dtype, micro, sharding)
    whole_step: dict[str, float] = {
        # On CPU the memory of the logits is kept from call to call.
        "logits": head.logits if on_cpu else 0,
        "weights": weight_bytes(model, config.adapter, execution, sharding),
        "optimizer": optimizer_bytes(groups, config.optim, machine, sharding),
        "half-precision copies": autocast_bytes(model, sharding),
    }
    activations = activation_bytes(model, config.adapter, config.dropout, execution, sharding, micro)
    unsharded = unsharded_bytes(
        model, execution.frozen_dtype, sharding, keeps_gradients=_keeps_unsharded_gradients(machine, micro)
    )
    phases = _phases(model, machine, micro, head, activations, unsharded)
    phases["the optimizer's step"] = {
        "gradients": gradient_bytes(model, sharding),
        "step": 0 if machine.offload_optimizer else step_bytes(groups, sharding.share),
    }
    estimate = _peak_phase(whole_step, phases, machine)
    if machine.offload_optimizer and not on_cpu:
        host = host_bytes(groups, config.optim, sharding.share, page_locked=True)
        return replace(estimate, host=host, host_limit=host_limit(machine))
    return estimate


def _phases(
    model: "PreTrainedModel",
    machine: Machine,
    micro: MicroShape,
    head: LMHeadBytes,
    activations: ActivationBytes,
    unsharded: UnshardedBytes,
) -> dict[str, dict[str, float]]:
    """Return what forward and backward pass hold beside what the whole step holds, at the points of a possible peak."""
    sharding = sharding_and_precision(machine)
    gradients = gradient_bytes(model, sharding)
    # With DDP the gradients of the last micro-batch go into its buckets, which exist all the time, and those of the
    # micro-batches before are kept beside them until then.
    kept = gradients * (micro.accumulates + (machine.strategy == "ddp"))
    if _keeps_unsharded_gradients(machine, micro):
        kept = gradients = gradient_bytes(model, replace(sharding, shards=1))
    is_tied, is_sharded = model.config.tie_word_embeddings, sharding.shards > 1
    embedding_share = embedding_gradient_share(model, sharding)
    # With a tied weight, the head's gradient is held until the embedding's is computed. If it is not tied, it is among
    # the gradients at once, except that FSDP2 has reduced it by then.
    head_gradient = head.weight_gradient if is_tied or not (kept or is_sharded) else 0
    # FSDP2 adds each reduced gradient to the one of the micro-batches before.
    reduced = embedding_share if is_sharded and micro.accumulates else 0
    logits = 0 if machine.accelerator == "cpu" else head.logits
    after_forward = {"gradients": kept, "activations": activations.after_forward}
    return {
        "the embedding of a micro-batch": {"gradients": kept, "unsharded": unsharded.embedding},
        "the gathering of the head's weight": after_forward | {"unsharded": unsharded.head_gather},
        "the head of a micro-batch": after_forward
        | {"head": logits + head.workspace + head.weight_gradient, "unsharded": unsharded.head},
        "the reduction of the head's gradient": after_forward | {"unsharded": unsharded.head_reduction},
        "a layer computed again": {
            "gradients": kept,
            "activations": activations.peak_recompute,
            "head": head_gradient,
            "unsharded": unsharded.layers,
        },
        "the lowest layer's backward pass": {
            "gradients": gradients if kept else gradients - embedding_share,
            "activations": activations.lowest_layer,
            "head": head_gradient if is_tied else 0,
            "unsharded": unsharded.layers,
        },
        "the end of a backward pass": {
            "gradients": gradients + reduced,
            "head": (head_gradient if is_tied else 0) + embedding_gradient_bytes(model, micro, sharding),
            "unsharded": unsharded.layers if is_tied else unsharded.embedding_reduction,
        },
    }


def _keeps_unsharded_gradients(machine: Machine, micro: MicroShape) -> bool:
    """Whether gradients are unsharded until the last micro-batch reduces them."""
    return machine.strategy == "fsdp" and machine.reduce_once and micro.accumulates


def host_limit(machine: Machine) -> float:
    """Return the bytes of the host's memory that optimizers may take for one device; 0 if it is unknown."""
    return OFFLOAD_SHARE * machine.host_memory / machine.devices


def optimizer_bytes(
    groups: list[ParameterGroup], config: OptimConfig, machine: Machine, sharding: ShardingAndPrecision
) -> float:
    """Return the bytes of device memory that the optimizer's state takes."""
    on_cpu = machine.accelerator == "cpu"
    if machine.offload_optimizer:
        return host_bytes(groups, config, sharding.share, page_locked=False) if on_cpu else 0
    # Paged optimizer state moves to the host's memory when the GPU is full. On CPU nothing is paged.
    return 0 if OPTIMIZERS[config.name].is_paged and not on_cpu else state_bytes(groups, config, sharding.share)


def sharding_and_precision(machine: Machine) -> ShardingAndPrecision:
    return ShardingAndPrecision(
        device=machine.accelerator,
        shards=machine.world_size if machine.strategy == "fsdp" else 1,
        precision_bytes=machine.compute_dtype.itemsize,
    )


def _peak_phase(whole_step: dict[str, float], phases: dict[str, dict[str, float]], machine: Machine) -> MemoryEstimate:
    """Return the phase that needs most memory, with the components of the whole step and a reserve."""
    phase, own = max(phases.items(), key=lambda item: sum(item[1].values()))
    components = {name: size for name, size in (whole_step | own).items() if size}
    on_cuda = CONTEXT_BYTES + FRAGMENTED_SHARE * sum(components.values())
    on_cuda += COMMUNICATOR_BYTES * (machine.world_size > 1)
    components["reserve"] = on_cuda if machine.accelerator == "cuda" else PROCESS_BYTES
    return MemoryEstimate(phase, components, machine.device_memory)
