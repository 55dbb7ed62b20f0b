"""The memory of each phase of a run: loading, training, validation, export and answering prompts.

Loading and export hold one tensor at a time beside the model, so training needs most, except in a run that trains
little of a large model with few tokens per micro-batch.
"""

from typing import TYPE_CHECKING

import torch

from qwlit.config.run import RunConfig
from qwlit.data.prompts import EVAL_BATCH_SIZE, EVAL_BATCH_TOKENS
from qwlit.model.config import Execution
from qwlit.planning.memory.estimate import MemoryEstimate
from qwlit.planning.memory.state import FLOAT32, MicroShape, ShardingAndPrecision, weight_bytes
from qwlit.training.machine import Machine

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def bytes_by_phase(
    config: RunConfig,
    model: "PreTrainedModel",
    machine: Machine,
    execution: Execution,
    step: MemoryEstimate,
    micro: MicroShape,
    *,
    copy: float,
) -> dict[str, float]:
    """Return the bytes that a device holds in each phase, in the order of the run.

    Args:
        model: on the meta device, with its adapters.
        step: the memory of a training step.
        micro: the largest micro-batch; validation takes the same limits.
        copy: bytes of a checkpoint's copy; the first save makes it, and it stays for those that follow.
    """
    on_cpu = machine.accelerator == "cpu"
    held = step.components.get
    weights, reserve = held("weights", 0), held("reserve", 0)
    trained = reserve + weights + held("optimizer", 0) + held("logits", 0) + copy
    largest = max(parameter.numel() for parameter in model.parameters())
    # Published weights are bfloat16; a preset does not say so.
    is_pretrained = config.model.init == "pretrained"
    stored = (model.config.dtype or (torch.bfloat16 if is_pretrained else torch.float32)).itemsize
    # The pages of the file and the slice read from them, or a drawn tensor. On CUDA they are in the host's memory.
    read = largest * (2 * stored if is_pretrained else FLOAT32) if on_cpu else 0
    # At the end of a training Lightning moves everything from CUDA to the host.
    after = trained if on_cpu else reserve
    phases = {
        "loading": reserve + weights + read,
        "training": step.total + copy,
        "validation": trained + _forward_bytes(model, machine, micro.tokens),
        "export": after + (largest * stored if on_cpu else 0),
    }
    if config.data.exact_match:
        unsharded = ShardingAndPrecision(machine.accelerator, 1, machine.compute_dtype.itemsize)
        # After FSDP2 the first rank builds the whole model again, because the other ranks have ended.
        builds = machine.strategy == "fsdp" or not on_cpu
        whole = weight_bytes(model, config.adapter, execution, unsharded) if builds else 0
        phases["answering"] = after + whole + _answering_bytes(model, machine)
    return phases


def _answering_bytes(model: "PreTrainedModel", machine: Machine) -> float:
    """Return what a batch of prompts takes: a forward pass, the KV cache with a layer's copy, and the scores."""
    config = model.config
    keys = config.num_key_value_heads * config.head_dim * (config.num_hidden_layers + 1)
    cache = 2 * FLOAT32 * EVAL_BATCH_TOKENS * keys
    # The logits, their float32 copy, and the scores that are made of them.
    scores = 3 * FLOAT32 * EVAL_BATCH_SIZE * config.vocab_size
    return float(_forward_bytes(model, machine, EVAL_BATCH_TOKENS) + cache + scores)


def _forward_bytes(model: "PreTrainedModel", machine: Machine, tokens: int) -> float:
    """Return the most that a forward pass without gradients holds: in a feed-forward block, with its input.

    Gate, up and their product are in the compute dtype; the residual stream, its norm and the sum are float32.
    """
    config = model.config
    compute = machine.compute_dtype.itemsize
    return float(tokens * (3 * compute * config.intermediate_size + 3 * FLOAT32 * config.hidden_size))
