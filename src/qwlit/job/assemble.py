"""From a checked configuration to everything a training needs but the weights: machine, tokenizer, data, steps."""

from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedTokenizerFast

from qwlit.config.compose import Composed
from qwlit.config.derive import Derived, derive, plan_steps
from qwlit.config.run import RunConfig
from qwlit.core.console import console
from qwlit.core.errors import ConfigError
from qwlit.data.encoding import RowEncoder
from qwlit.data.splits import DataSplit, split_data
from qwlit.data.step_plan import StepPlan
from qwlit.job.corpus import open_corpus
from qwlit.model.config import AttentionKernel, Execution
from qwlit.model.cost import training_state_bytes
from qwlit.model.loss_model import LossModel, build_loss_model, rehearse
from qwlit.optim.config import BITSANDBYTES
from qwlit.optim.groups import plan_groups
from qwlit.training.machine import Machine, resolve_attention, resolve_compile, resolve_machine


@dataclass(frozen=True)
class Job:
    """What is known before the weights are loaded."""

    config: RunConfig
    choices: dict[str, str]
    machine: Machine
    execution: Execution
    tokenizer: PreTrainedTokenizerFast | None
    """None when the rows are tokens already and the model has no tokenizer."""
    encoder: RowEncoder
    data: DataSplit
    plan: StepPlan
    derived: Derived

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id if self.tokenizer else None
        return 0 if pad is None else int(pad)


def assemble(composed: Composed) -> Job:
    """Answer what depends on this machine, tokenize the data, and lay out the run.

    Raises:
        ConfigError, DataError: something that is asked for is not here, or wrong.
    """
    config = composed.config
    refusal = _why_whole(config)
    state_bytes = partial(training_state_bytes, config.model, config.adapter, config.optim.amsgrad)
    machine = resolve_machine(
        config.hardware,
        config.determinism,
        profile=composed.choices.get("hardware") or "of this config.yaml",
        state_bytes=None if refusal else state_bytes,
    )
    if machine.strategy == "fsdp":
        _check_sharding(config, machine, refusal)
    attention = resolve_attention(
        config.model.attention,
        machine=machine,
        determinism=config.determinism,
        attention_dropout=config.dropout.attention,
    )
    compiled, finding = resolve_compile(config.hardware.compile, machine, _why_not_compiled(config, machine, attention))
    # What freeze.* keeps is exported with the rest, so it stays what it was to the bit.
    frozen = torch.float32 if config.adapter.kind == "none" else machine.frozen_dtype
    execution = Execution(attention, machine.memory, frozen, machine.compute_dtype, compiled)
    # Before hours of tokenizing: a name that matches nothing is known from the shape alone.
    plan_groups(rehearse(config.model, config.adapter, config.dropout, config.freeze).named_parameters(), config.optim)
    corpus = open_corpus(config, console())
    data = split_data(config.data, corpus.training, corpus.validation)
    plan = plan_steps(config, data, machine.world_size)
    for samples in (data.train, data.validation):
        if samples is not None:
            plan.limits.check(samples)
    derived = derive(config, plan, has_validation=data.validation is not None, accelerator=machine.accelerator)
    derived.findings.extend(finding)
    return Job(config, composed.choices, machine, execution, corpus.tokenizer, corpus.encoder, data, plan, derived)


def _why_whole(config: RunConfig) -> str | None:
    """Return the setting that only works on whole tensors, None where all can be sharded."""
    if config.adapter.quantization != "none":
        return f"adapter.quantization={config.adapter.quantization}"
    return f"optim.name={config.optim.name}" if config.optim.name in BITSANDBYTES else None


def _check_sharding(config: RunConfig, machine: Machine, refusal: str | None) -> None:
    if refusal:
        raise ConfigError(f"{refusal} cannot be sharded; set hardware.strategy=ddp, or another optimizer or recipe")
    if config.optim.name == "muon" and config.adapter.kind == "lora" and config.adapter.rank < machine.world_size:
        raise ConfigError(
            f"optim.name=muon cannot shard adapters of rank {config.adapter.rank} over {machine.world_size} devices;"
            " raise adapter.rank, or set hardware.strategy=ddp or optim=adamw"
        )


def _why_not_compiled(config: RunConfig, machine: Machine, attention: AttentionKernel) -> str | None:
    """Return the setting under which a layer is not one graph for all batches."""
    if config.determinism == "strict":
        return "determinism=strict computes layers as they are written"
    if machine.memory == "offload":
        return "hardware.memory=offload moves tensors in the middle of a layer"
    if config.adapter.use_dora:
        return "peft's DoRA (adapter.use_dora=true) cannot be traced"
    if config.data.packing and attention != "varlen":
        return f"packed samples under {attention} attention would need a graph for each packing (dropout.attention=0?)"
    return None


def load_model(job: Job, *, leave_empty: bool = False) -> LossModel:
    """Load or make the weights, with adapter, dropout and attention as set; `leave_empty` to fill them when sharded."""
    config = job.config
    return build_loss_model(
        config.model,
        config.adapter,
        config.dropout,
        config.freeze,
        job.execution,
        seed=config.seed,
        leave_empty=leave_empty,
    )
