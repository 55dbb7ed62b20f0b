"""How large a checkpoint is, how long one takes to write, and whether the training goes on meanwhile."""

from dataclasses import dataclass

from qwlit.optim.config import OptimConfig
from qwlit.optim.groups import ParameterGroup
from qwlit.planning.memory.estimate import MemoryEstimate
from qwlit.planning.memory.optimizer import state_bytes
from qwlit.training.machine import Machine

WRITE_SPEED = 0.5e9
"""Bytes per second that one rank writes and hashes. Assumption; measured on a local disk: benchmarks/results/save.json.
"""


@dataclass(frozen=True)
class SavePlan:
    """The checkpoints of a run."""

    num_bytes: float
    """Bytes of one checkpoint: trained weights in float32, and the optimizer's state."""
    writers: int
    """The number of ranks that write it together."""
    is_copied: bool
    """Whether a save begins with a copy in host memory, from which it is written while the training goes on."""

    @property
    def seconds(self) -> float:
        """Seconds until a checkpoint is on the disk."""
        return self.num_bytes / self.writers / WRITE_SPEED

    def device_copy_bytes(self, machine: Machine) -> float:
        """Return the bytes of device memory that the copy takes; on CUDA it is in the host's memory."""
        return self.num_bytes if self.is_copied and machine.accelerator == "cpu" else 0.0


HOST_SHARE = 0.5
"""Of a node's host memory, for the copies of its ranks and optimizers that step there; the rest is for processes,
loaders and the page cache. Assumption."""


def plan_saves(
    groups: list[ParameterGroup],
    config: OptimConfig,
    machine: Machine,
    memory: MemoryEstimate,
) -> SavePlan:
    """Return the size of a checkpoint, and whether this machine has the memory for a copy of it.

    On CPU the copy takes the memory of the training. On CUDA it takes the host's.
    """
    num_weights = sum(group.size for group in groups)
    num_bytes = 4.0 * num_weights + state_bytes(groups, config, lambda parameter: parameter.numel())
    writers = machine.world_size if machine.strategy == "fsdp" else 1
    if machine.accelerator == "cpu":
        is_copied = memory.device <= 0 or memory.total + num_bytes <= memory.device
    else:
        copies = num_bytes / writers * min(writers, machine.devices)
        held = copies + memory.host * machine.devices
        is_copied = not machine.host_memory or held <= HOST_SHARE * machine.host_memory
    return SavePlan(num_bytes, writers, is_copied)
