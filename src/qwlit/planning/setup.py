"""Resolve everything that follows from settings and machine, without tokenizer, data and weights."""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import torch

from qwlit.config.compose import Composed
from qwlit.config.run import RunConfig
from qwlit.core.errors import ConfigError
from qwlit.model.config import AttentionKernel, Execution
from qwlit.model.loss_model import build_meta_model
from qwlit.model.quantize import check_blocks
from qwlit.optim.groups import ParameterGroup, plan_groups
from qwlit.planning.memory.estimate import MemoryEstimate, estimate_memory
from qwlit.planning.memory.levels import candidates, why_not_on_host, why_not_sharded
from qwlit.planning.memory.state import MicroShape
from qwlit.planning.preflight.rules import check_allowed
from qwlit.training.machine import Machine, resolve_attention, resolve_compile, resolve_machine, why_not_varlen

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# `plan` tries many hardware settings with the same model.
_meta_model = lru_cache(maxsize=4)(build_meta_model)


def forget_meta_models() -> None:
    """Make the next setup read the model's folder again: in a notebook it may have changed."""
    _meta_model.cache_clear()


@dataclass(frozen=True)
class Setup:
    """A run without its data: the model's shape, the machine, and how the model runs on it."""

    composed: Composed
    model: "PreTrainedModel"
    """On the meta device, with its adapters and frozen parameters."""
    groups: list[ParameterGroup]
    """Trainable parameters by learning rate and weight decay."""
    machine: Machine
    execution: Execution
    compile_obstacle: str | None
    """Why hardware.compile=auto does not compile the layers; None if layers are compiled, or hardware.compile is not
    auto."""

    @property
    def config(self) -> RunConfig:
        return self.composed.config

    @property
    def attention(self) -> str:
        """The attention kernel, and why it was taken where model.attention=auto."""
        if self.config.model.attention != "auto":
            return self.execution.attention
        if self.config.determinism == "strict":
            return f"{self.execution.attention} (determinism=strict)"
        obstacle = why_not_varlen(self.machine)
        return f"{self.execution.attention} (auto{f': {obstacle}' if obstacle else ''})"

    @cached_property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def num_trainable(self) -> int:
        return sum(group.size for group in self.groups)

    def fit_memory(self, micro: MicroShape) -> tuple["Setup", MemoryEstimate]:
        """Choose the level of memory where it is "auto": the fastest that fits, else the smallest.

        Args:
            micro: the micro-batch that takes the most memory.
        """
        *faster, smallest = candidates(self.config, self.machine, self.groups)
        last = self._estimate(smallest, micro)
        if last[1].fits is not False:
            for machine in faster:
                candidate = self._estimate(machine, micro)
                if candidate[1].fits is not False:
                    return candidate
        return last

    def _estimate(self, machine: Machine, micro: MicroShape) -> tuple["Setup", MemoryEstimate]:
        level = machine.activation_checkpointing
        # `compiled` was chosen before the level of activation checkpointing, and offloading layers cannot be compiled.
        compiled = self.execution.compiled and level != "offload"
        execution = replace(self.execution, activation_checkpointing=level, compiled=compiled)
        estimate = estimate_memory(self.config, self.model, self.groups, machine, execution, micro)
        return replace(self, machine=machine, execution=execution), estimate


def machine_of(composed: Composed, *, trust_profile: bool = False) -> Machine:
    """Return the machine of a run, see `resolve_machine`."""
    config = composed.config
    profile = composed.choices.get("hardware") or "of this config.yaml"
    return resolve_machine(config.hardware, config.determinism, profile=profile, trust_profile=trust_profile)


def resolve_setup(composed: Composed, *, machine: Machine | None = None, trust_profile: bool = False) -> Setup:
    """Resolve what depends on the machine, and match every pattern against the model's parameters.

    Args:
        machine: that of the run, if it is resolved already.
        trust_profile: take the devices from the hardware profile; do not inspect this machine.

    Raises:
        ConfigError: a device or a model file is missing, settings cannot be combined, or a pattern matches nothing.
    """
    config = composed.config
    check_allowed(config.preflight.allow)
    machine = machine or machine_of(composed, trust_profile=trust_profile)
    refusal = why_not_sharded(config, machine)
    if machine.strategy == "fsdp" and refusal:
        raise ConfigError(refusal)
    if reason := why_not_on_host(config, machine):
        raise ConfigError(reason)
    attention = resolve_attention(config.model.attention, machine=machine, determinism=config.determinism)
    compiled, obstacle = resolve_compile(
        config.hardware.compile, machine, _why_not_compiled(config, machine, attention), trust_profile=trust_profile
    )
    # Without an adapter, frozen parameters are exported too, so they stay float32 and do not change by a bit.
    frozen = torch.float32 if config.adapter.kind == "none" else machine.frozen_dtype
    # The model's shape is enough to find patterns that match nothing, before hours of tokenizing.
    unquantized = replace(config.adapter, quantization="none")
    model = _meta_model(config.model, unquantized, config.dropout, config.freeze)
    if config.adapter.quantization == "nf4":
        check_blocks(model)
    return Setup(
        composed,
        model,
        plan_groups(model.named_parameters(), config.optim),
        machine,
        Execution(attention, machine.activation_checkpointing, frozen, machine.compute_dtype, compiled),
        obstacle,
    )


def _why_not_compiled(config: RunConfig, machine: Machine, attention: AttentionKernel) -> str | None:
    """Return the setting because of which a layer cannot be one graph for all batches; None if there is none."""
    if config.determinism == "strict":
        return "determinism=strict does not compile layers"
    if machine.activation_checkpointing == "offload":
        return "hardware.activation_checkpointing=offload moves tensors in the middle of a layer"
    if config.adapter.use_dora:
        return "peft's DoRA (adapter.use_dora=true) cannot be traced"
    if config.data.packing and attention != "varlen":
        return f"{attention} attention is computed one packed sample at a time"
    return None
