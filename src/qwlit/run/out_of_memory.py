"""The error for a device that runs out of memory: what holds the memory, and what to change."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from qwlit.config.remedies import remedies
from qwlit.core.errors import ConfigError
from qwlit.core.sharding import local

if TYPE_CHECKING:
    from qwlit.run.training_run import TrainingRun


def out_of_memory(trainer: Trainer, module: nn.Module, run: "TrainingRun") -> ConfigError:
    """Return the error that says what holds the memory and which overrides to try, in order.

    On CUDA it also writes a snapshot of the allocator into the run folder, for pytorch.org/memory_viz.
    """
    held = _holders(module, trainer.optimizers)
    total = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else sum(held.values())
    held["activations and buffers"] = max(0, total - sum(held.values()))
    largest = sorted(held.items(), key=lambda item: -item[1])
    named = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in largest)
    # Other overrides make another run of it.
    resumable = [text for text in remedies("memory", run.tried) if text.startswith("hardware.")]
    overrides = " · ".join(resumable) or "recipe=lora, or a larger device"
    snapshot = ""
    if torch.cuda.is_available():
        file = Path(trainer.default_root_dir) / f"memory_snapshot-rank{trainer.global_rank}.pickle"
        torch.cuda.memory._dump_snapshot(str(file))
        snapshot = f" The allocator's state is in {file.name}."
    return ConfigError(
        f"out of memory in step {trainer.global_step + 1} on {run.plan.machine.device_name}: {named}."
        f" Try in this order: {overrides}.{snapshot} The run then resumes from its last checkpoint"
    )


def _holders(module: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, int]:
    parameters = list(module.parameters())
    device = parameters[0].device
    states = [v for o in optimizers for state in o.state.values() for v in state.values() if isinstance(v, Tensor)]
    # An optimizer on the host has its state there.
    states = [state for state in states if local(state).device == device]
    return {
        "weights": _bytes(parameters),
        "gradients": _bytes(p.grad for p in parameters if p.grad is not None),
        "optimizer": _bytes(states),
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the tensors, or of this rank's shard slices of them."""
    return sum(local(t).numel() * t.element_size() for t in tensors)
