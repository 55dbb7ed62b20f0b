"""Measure, at logged steps, the gradient norm and the relative update of each parameter group; count clipped steps.

Shapes: G groups.
"""

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer

from qwlit.core.batch import StepBatch
from qwlit.core.sharding import local
from qwlit.training.milestones import Milestones
from qwlit.training.module import CausalLMModule

SAMPLED = 4096
"""Elements of each tensor whose update is measured, evenly spaced: under FSDP2 of each shard slice."""


class GroupTelemetry(Callback):
    """Sums on the device; `measure` hands them to Telemetry. It must come before Telemetry in the list of callbacks."""

    def __init__(self, milestones: Milestones, max_grad_norm: float | None) -> None:
        self._milestones = milestones
        self._max_grad_norm = max_grad_norm
        self._groups: dict[str, list[nn.Parameter]] = {}
        self._samples: dict[str, list[Tensor]] = {}
        """Views of the weights."""
        self._gradients: Tensor | None = None
        """(G,) squared gradient norms, before clipping."""
        self._before: list[Tensor] = []
        """The samples of each group before the step."""
        self._measured: dict[str, Tensor] = {}
        self._counts = torch.zeros(2)
        """Clipped and skipped steps since the last record."""
        self._num_steps = 0

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self._counts.tolist(), "num_steps": self._num_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._counts = torch.tensor(state_dict["counts"])
        self._num_steps = state_dict["num_steps"]

    def on_train_start(self, trainer: Trainer, pl_module: CausalLMModule) -> None:
        self._counts = self._counts.to(pl_module.device)
        for group in pl_module.optimizers(use_pl_optimizer=False).param_groups:  # type: ignore[union-attr]
            # Groups of two algorithms, or of two learning rates, may have the same name.
            self._groups.setdefault(group["name"], []).extend(group["params"])
        self._samples = {
            name: [_sample(local(p.detach())) for p in parameters] for name, parameters in self._groups.items()
        }

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: CausalLMModule, optimizer: Optimizer) -> None:
        if not self._milestones.log(trainer.global_step + 1):
            return
        gradients = [[local(p.grad) for p in group if p.grad is not None] for group in self._groups.values()]
        scale = pl_module.loss_scale.factor if pl_module.loss_scale else 1.0
        norms = [nn.utils.get_total_norm(group, foreach=True) for group in gradients]
        self._gradients = (torch.stack(norms).double() / scale).square()
        self._before = [torch.cat(views) for views in self._samples.values()]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: CausalLMModule, outputs: Any, batch: StepBatch, batch_idx: int
    ) -> None:
        skipped = pl_module.outcome.skipped
        clipped = (pl_module.outcome.grad_norm > (self._max_grad_norm or torch.inf)).float() * (1 - skipped)
        self._counts += torch.stack([clipped, skipped])
        self._num_steps += 1
        if self._gradients is not None:
            self._measured = self._compare(self._gradients, is_sharded=pl_module.is_sharded)
            self._gradients, self._before = None, []

    def _compare(self, gradients: Tensor, *, is_sharded: bool) -> dict[str, Tensor]:
        after = [torch.cat(views) for views in self._samples.values()]
        updates = [_square_sum(new - old) for new, old in zip(after, self._before, strict=True)]
        sums = torch.stack([gradients, torch.stack(updates), torch.stack([_square_sum(old) for old in self._before])])
        if is_sharded:
            dist.all_reduce(sums)
        norms, updates, weights = sums.sqrt()
        # Weights that begin at 0, such as LoRA's B matrices, have no relative update.
        ratios = torch.where(weights > 0, updates / weights, 0)
        return {
            **{f"optim/grad_norm/{name}": norm for name, norm in zip(self._groups, norms, strict=True)},
            **{f"optim/update_ratio/{name}": ratio for name, ratio in zip(self._groups, ratios, strict=True)},
        }

    def measure(self) -> dict[str, Tensor]:
        """Return what was measured since the last call, float scalars on the device, by the names of metrics.jsonl."""
        shares = self._counts / max(1, self._num_steps)
        measured = {**self._measured, "optim/clipped_share": shares[0], "optim/skipped_share": shares[1]}
        self._counts, self._num_steps, self._measured = torch.zeros_like(self._counts), 0, {}
        return measured


def _sample(weights: Tensor) -> Tensor:
    """Return a view of at most SAMPLED elements."""
    flat = weights.view(-1)
    return flat[:: max(1, -(-len(flat) // SAMPLED))]


def _square_sum(values: Tensor) -> Tensor:
    return values.double().square().sum()
