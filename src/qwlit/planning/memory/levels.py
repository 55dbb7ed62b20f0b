"""The levels of memory that a run may take, and what prevents some of them.

A level is a strategy, a level of activation checkpointing, where the optimizer steps, and how often FSDP2 reduces
gradients. All of them compute the same.
"""

from collections.abc import Iterator
from dataclasses import replace

from qwlit.config.run import RunConfig
from qwlit.core.sharding import fewest_rows
from qwlit.model.config import CHECKPOINTING_LEVELS, ActivationCheckpointing
from qwlit.optim.groups import ParameterGroup
from qwlit.optim.kinds import OPTIMIZERS
from qwlit.planning.memory.estimate import host_limit, sharding_and_precision
from qwlit.planning.memory.optimizer import host_bytes
from qwlit.training.machine import Machine, Strategy


def candidates(config: RunConfig, machine: Machine, groups: list[ParameterGroup]) -> list[Machine]:
    """Return the machine with every level that "auto" allows, fastest first.

    Reducing gradients more often and sharding cost communication, a level that keeps less of the forward pass costs
    recomputation, and the optimizer's step on the host costs most.
    """
    return [
        replace(
            machine, strategy=strategy, activation_checkpointing=level, offload_optimizer=offloads, reduce_once=once
        )
        for offloads in _placements(config, machine, groups)
        for level in _checkpointing_levels(config, machine)
        for strategy in _strategies(config, machine)
        if why_not_on_host(config, replace(machine, strategy=strategy, offload_optimizer=offloads)) is None
        for once in ((True, False) if strategy == "fsdp" else (True,))
    ]


def _checkpointing_levels(config: RunConfig, machine: Machine) -> tuple[ActivationCheckpointing, ...]:
    if config.hardware.activation_checkpointing != "auto":
        return (machine.activation_checkpointing,)
    # On CPU, offloading saves no memory.
    return CHECKPOINTING_LEVELS if machine.accelerator == "cuda" else CHECKPOINTING_LEVELS[:-1]


def _strategies(config: RunConfig, machine: Machine) -> Iterator[Strategy]:
    yield machine.strategy
    # On CPU all processes share the host's memory, so sharding saves none. With FSDP2 there is no loss scale.
    may_shard = machine.accelerator == "cuda" and machine.precision != "16-mixed"
    is_auto = config.hardware.strategy == "auto" and machine.strategy == "ddp"
    if is_auto and may_shard and why_not_sharded(config, machine) is None:
        yield "fsdp"


def _placements(config: RunConfig, machine: Machine, groups: list[ParameterGroup]) -> Iterator[bool]:
    """Yield whether the optimizer may step on the host."""
    if config.hardware.offload_optimizer != "auto":
        yield machine.offload_optimizer
        return
    yield False
    strategy: Strategy = "single" if machine.world_size == 1 else "fsdp"
    on_host = replace(machine, strategy=strategy, offload_optimizer=True)
    needed = host_bytes(groups, config.optim, sharding_and_precision(on_host).share, page_locked=True)
    if machine.accelerator == "cuda" and (not machine.host_memory or needed <= host_limit(machine)):
        yield True


def why_not_on_host(config: RunConfig, machine: Machine) -> str | None:
    """Return why the optimizer cannot step on the host, with the remedy; None if it can, or steps on the device."""
    if not machine.offload_optimizer:
        return None
    if not OPTIMIZERS[config.optim.name].can_step_on_host:
        names = " or ".join(f"optim={name}" for name, kind in OPTIMIZERS.items() if kind.can_step_on_host)
        return f"hardware.offload_optimizer=true: optim.name={config.optim.name} cannot step on the host; set {names}"
    if machine.strategy == "ddp":
        return (
            "hardware.offload_optimizer=true: with ddp the host would step the whole model once per device; set"
            " hardware.strategy=fsdp"
        )
    return None


def why_not_sharded(config: RunConfig, machine: Machine) -> str | None:
    """Return the setting that does not work on sharded tensors, with its remedy; None if there is none."""
    if config.adapter.quantization != "none":
        more = " and hardware.offload_optimizer=false" if machine.offload_optimizer else ""
        return f"adapter.quantization={config.adapter.quantization} cannot be sharded; set hardware.strategy=ddp{more}"
    optimizer = OPTIMIZERS[config.optim.name]
    if optimizer.sharding == "none":
        return f"optim.name={config.optim.name} cannot be sharded; set hardware.strategy=ddp or optim=adamw"
    rank, count = config.adapter.rank, machine.world_size
    has_too_few_rows = fewest_rows(rank, count) == 0 if optimizer.sharding == "slices" else rank < count
    if optimizer.needs_rows_on_each_rank and config.adapter.kind == "lora" and has_too_few_rows:
        return (
            f"optim.name={config.optim.name} cannot shard adapters of rank {rank} over {count}"
            " devices; raise adapter.rank, or set hardware.strategy=ddp or optim=adamw"
        )
    return None
