"""Find damage to the state of the training: weights and moments, and replicas that no longer hold the same weights.

The test runs on the device and the host reads its result a step later. It follows each logged step, each skipped step,
because damaged weights are one reason for a skip, and each save, because a checkpoint holds the weights of one replica
only. After damage the same step with the same data is fine: the guard keeps both data and learning rate.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from qwlit.core.batch import StepBatch
from qwlit.core.sharding import local
from qwlit.training.async_readback import AsyncReadback
from qwlit.training.milestones import Milestones
from qwlit.training.module import CausalLMModule
from qwlit.training.resilience.guard import Guard

LARGEST_WEIGHT = 1e12
"""A flipped bit of the exponent makes a weight larger than this. Updates do not, at a learning rate up to 1; above that
the limit grows with the learning rate."""
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "state2")
"""torch's names and bitsandbytes'. They are averages of squares, so they are never negative."""
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by their bytes."""


@dataclass(frozen=True)
class StateTest:
    """A test that runs on the device."""

    step: int
    largest_weight: float
    tensors: tuple[str, ...]
    weights: tuple[str, ...]
    """Names of the weights that the replicas compare; empty without replicas."""
    checksums: Tensor
    """(weights,) int64, of this rank."""


class StateHealth(Callback):
    """Tests the state, and lets the guard go back where it is damaged. Every rank reads the same results."""

    def __init__(self, milestones: Milestones, guard: Guard) -> None:
        self._milestones = milestones
        self._guard = guard
        self._reader: AsyncReadback[StateTest] = AsyncReadback()
        self._tested_step = 0
        self._known_skips = 0
        self._trainer: Trainer
        self._module: CausalLMModule

    def on_train_start(self, trainer: Trainer, pl_module: CausalLMModule) -> None:
        self._trainer, self._module = trainer, pl_module
        self._known_skips = self._guard.skipped_steps

    def state_dict(self) -> dict[str, Any]:
        self._test(self._trainer.global_step)
        self._judge(wait=True)
        return {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: CausalLMModule, outputs: Any, batch: StepBatch, batch_idx: int
    ) -> None:
        step = batch.step + 1
        # The guard has waited for the numbers of the step before, so this test has ended too.
        self._judge(wait=True)
        if self._milestones.log(step) or self._guard.skipped_steps > self._known_skips:
            self._known_skips = self._guard.skipped_steps
            self._test(step)
        self._judge(wait=step == self._milestones.total_steps)

    def _test(self, step: int) -> None:
        """Start a test of the state after this step, unless there was one."""
        if step == self._tested_step:
            return
        self._tested_step = step
        state = {name: local(tensor) for name, tensor in self._module.trained_state().items()}
        # Moments first: a damaged one damages the weight in the same step, and the message must name the cause.
        state = {name: state[name] for name in sorted(state, key=_is_weight) if state[name].is_floating_point()}
        has_replicas = self._trainer.world_size > 1 and not self._module.is_sharded
        # Also the frozen weights: nothing would ever repair them.
        weights = dict(self._module.named_parameters()) if has_replicas else {}
        ends, own = extremes(state, self._module.device), checksums(weights, self._module.device)
        differs = torch.zeros(0, device=self._module.device)
        if self._trainer.world_size > 1:
            dist.all_reduce(ends, op=dist.ReduceOp.MAX)
        if weights:
            # All ranks agree on a checksum if the largest is also the smallest, which is minus the largest of -x.
            sums = torch.stack([own, -own])
            dist.all_reduce(sums, op=dist.ReduceOp.MAX)
            differs = sums[0] != -sums[1]
        largest_weight = LARGEST_WEIGHT * max(1.0, self._module.outcome.lr)
        test = StateTest(step, largest_weight, tuple(state), tuple(weights), own)
        self._reader.push(test, torch.cat([ends.flatten(), differs.float()]))

    def _judge(self, *, wait: bool) -> None:
        for test, results in self._reader.pop(wait=wait):
            count = len(test.tensors)
            negated, largest, differs = results[:count], results[count : 2 * count], results[2 * count :]
            if any(differs):
                self._guard.alarm(test.step, _describe_drift(test), "state")
            for name, *ends in zip(test.tensors, negated, largest, strict=True):
                if problem := find_problem(name, *ends, largest_weight=test.largest_weight):
                    self._guard.alarm(test.step, f"{name} {problem}", "state")


def extremes(state: dict[str, Tensor], device: torch.device) -> Tensor:
    """Return (2, tensors) float32: minus the smallest value of each tensor, and the largest; infinity for NaN.

    An empty shard slice counts as 0. The host does not wait for the device.
    """
    filled = [tensor if tensor.numel() else torch.zeros(1, device=device) for tensor in state.values()]
    # It keeps NaN. On CPU it takes a twentieth of the time of torch's fused norm (16 million numbers: 3 against 72 ms).
    ends = [torch.stack(torch.aminmax(tensor)).to(device, torch.float32) for tensor in filled]
    signs = torch.linspace(-1, 1, 2, device=device)
    return torch.nan_to_num(torch.stack(ends, dim=1) * signs[:, None], torch.inf, torch.inf, -torch.inf)


def find_problem(name: str, negated_smallest: float, largest: float, *, largest_weight: float) -> str | None:
    """Return what is wrong with the tensor of this name; None where nothing is.

    Args:
        name: as `CausalLMModule.trained_state` names it.
        negated_smallest: minus its smallest value. `largest`: its largest one.
    """
    size = max(negated_smallest, largest)
    if not math.isfinite(size):
        return "is not finite"
    if negated_smallest > 0 and name.partition(" of ")[0] in SECOND_MOMENTS:
        return "has a negative value"
    return "has a value that no update makes" if _is_weight(name) and size > largest_weight else None


def _is_weight(name: str) -> bool:
    return " of " not in name


def checksums(weights: dict[str, Tensor], device: torch.device) -> Tensor:
    """Return the sum of each tensor's bits as integers, (weights,) int64. One flipped bit always changes it."""
    sums = [tensor.data.view(BITS[tensor.element_size()]).sum(dtype=torch.int64) for tensor in weights.values()]
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.int64, device=device)


def _describe_drift(test: StateTest) -> str:
    """Compare the checksums of all ranks: say which rank differs, and in which weight first. All ranks call it."""
    everywhere = [torch.empty_like(test.checksums) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, test.checksums)
    table = torch.stack(everywhere).tolist()
    for name, column in zip(test.weights, zip(*table, strict=True), strict=True):
        (most, count), *others = Counter(column).most_common()
        if not others:
            continue
        if count * 2 > len(column):
            ranks = [str(rank) for rank, checksum in enumerate(column) if checksum != most]
            who = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)} of {len(column)}"
            return f"the weights of {who} are not those of the other ranks, first in {name}"
        return f"the weights of the {len(column)} ranks are not the same, first in {name}"
    raise AssertionError("the ranks' checksums were not the same")
