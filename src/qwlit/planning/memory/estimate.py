"""How much memory a training takes on each device, and the cheapest way in which it fits."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qwlit.config.run import RunConfig
from qwlit.model.config import CHECKPOINTING_LEVELS, Execution
from qwlit.optim.groups import ParameterGroup
from qwlit.optim.kinds import OPTIMIZERS
from qwlit.planning.memory.activations import activation_bytes
from qwlit.planning.memory.optimizer import state_bytes, step_bytes
from qwlit.planning.memory.state import (
    MicroShape,
    Placement,
    autocast_bytes,
    embedding_gradient_bytes,
    gradient_bytes,
    head_bytes,
    unsharded_bytes,
    weight_bytes,
)
from qwlit.training.machine import Machine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GIB = 2**30
# Assumptions: the CUDA context with cuBLAS's workspaces, and the share that the allocator cannot use.
CONTEXT_BYTES, FRAGMENTED_SHARE = 0.6 * GIB, 0.04
# On CPU the interpreter and its libraries: measured, the demo's peak is 0.57 GiB resident, 0.1 of it counted here.
PROCESS_BYTES = 0.5 * GIB


@dataclass(frozen=True)
class MemoryEstimate:
    """A device's memory when it is fullest."""

    moment: str
    components: dict[str, float]
    """Bytes by what holds them."""
    device: float
    """Bytes there are; 0 where it is not known."""

    @property
    def total(self) -> float:
        return sum(self.components.values())

    @property
    def fits(self) -> bool | None:
        """None where the device is not known."""
        return self.total <= self.device if self.device else None


def estimate_memory(
    config: RunConfig,
    model: "PreTrainedModel",
    groups: list[ParameterGroup],
    machine: Machine,
    execution: Execution,
    micro: MicroShape,
) -> MemoryEstimate:
    """Count a device's memory at the moments when it may be fullest, and return the fullest one.

    Args:
        model: on the meta device, with adapters and frozen as it will be.
        micro: the micro-batch that takes the most memory.
    """
    place = _placement(machine)
    gradients = gradient_bytes(model, place)
    head = head_bytes(model, micro, place)
    on_cpu = machine.accelerator == "cpu"
    # Paged moments leave the GPU's memory when it is needed; on a CPU nothing is paged.
    pages = OPTIMIZERS[config.optim.name].is_paged and not on_cpu
    always: dict[str, float] = {
        # On CPU the memory of the logits is kept from call to call.
        "logits": head.logits if on_cpu else 0,
        "weights": weight_bytes(model, config.adapter, execution, place),
        "optimizer": 0 if pages else state_bytes(groups, config.optim, place.share),
        "half-precision copies": autocast_bytes(model, place),
    }
    root, reducing = unsharded_bytes(model, place)
    # DDP's buckets hold the gradients from the start.
    accumulated = gradients if micro.accumulates or machine.strategy == "ddp" else 0
    activations = activation_bytes(model, config.adapter, config.dropout, execution, place, micro)
    # A tied head's gradient waits for the embedding's, and FSDP2 reduces both together.
    waits = model.config.tie_word_embeddings or place.shards > 1
    head_gradient = head.weight_gradient if waits else 0
    moments: dict[str, dict[str, float]] = {
        "the head of a micro-batch": {
            "gradients": accumulated,
            "activations": activations.kept,
            "head": (0 if on_cpu else head.logits) + head.chunk + head.weight_gradient,
            "unsharded": root,
        },
        "a layer computed again": {
            "gradients": accumulated,
            "activations": activations.recomputing,
            "head": head_gradient,
            "unsharded": reducing,
        },
        "the end of a backward pass": {
            "gradients": gradients,
            "head": head_gradient + embedding_gradient_bytes(model, micro, place),
            "unsharded": reducing,
        },
        "the optimizer's step": {"gradients": gradients, "step": step_bytes(groups, place.share)},
    }
    return _fullest(always, moments, machine)


def _placement(machine: Machine) -> Placement:
    return Placement(
        device=machine.accelerator,
        shards=machine.world_size if machine.strategy == "fsdp" else 1,
        precision_bytes=machine.compute_dtype.itemsize,
    )


def _fullest(always: dict[str, float], moments: dict[str, dict[str, float]], machine: Machine) -> MemoryEstimate:
    """Return the moment that holds most, with what is there all the time and with a reserve."""
    moment, held = max(moments.items(), key=lambda item: sum(item[1].values()))
    components = {name: size for name, size in (always | held).items() if size}
    on_cuda = CONTEXT_BYTES + FRAGMENTED_SHARE * sum(components.values())
    components["reserve"] = on_cuda if machine.accelerator == "cuda" else PROCESS_BYTES
    return MemoryEstimate(moment, components, machine.device_memory)


def candidates(config: RunConfig, machine: Machine) -> list[Machine]:
    """Return the choices of strategy and checkpointing level where they are "auto", the fastest first.

    Sharding sends weights between devices, and a higher level computes activations again.
    """
    hardware, on_cuda = config.hardware, machine.accelerator == "cuda"
    # Offloading on CPU moves nothing anywhere.
    levels = CHECKPOINTING_LEVELS if on_cuda else CHECKPOINTING_LEVELS[:-1]
    levels = levels if hardware.activation_checkpointing == "auto" else (machine.activation_checkpointing,)
    strategies = [machine.strategy]
    # On CPU all processes share the host's memory, and FSDP2 has no loss scale.
    may_shard = on_cuda and machine.precision != "16-mixed" and why_not_sharded(config, machine) is None
    if hardware.strategy == "auto" and machine.strategy == "ddp" and may_shard:
        strategies.append("fsdp")
    return [
        replace(machine, strategy=strategy, activation_checkpointing=level)
        for level in levels
        for strategy in strategies
    ]


def why_not_sharded(config: RunConfig, machine: Machine) -> str | None:
    """Return the setting that only works on whole tensors, with its remedy; None where all can be sharded."""
    if config.adapter.quantization != "none":
        return f"adapter.quantization={config.adapter.quantization} cannot be sharded; set hardware.strategy=ddp"
    optimizer = OPTIMIZERS[config.optim.name]
    if not optimizer.can_be_sharded:
        return f"optim.name={config.optim.name} cannot be sharded; set hardware.strategy=ddp or optim=adamw"
    has_too_few_rows = config.adapter.kind == "lora" and config.adapter.rank < machine.world_size
    if optimizer.needs_rows_on_each_rank and has_too_few_rows:
        return (
            f"optim.name={config.optim.name} cannot shard adapters of rank {config.adapter.rank} over"
            f" {machine.world_size} devices; raise adapter.rank, or set hardware.strategy=ddp or optim=adamw"
        )
    return None
