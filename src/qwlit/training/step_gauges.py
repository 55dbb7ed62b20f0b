"""Measure, at logged steps, the last layer and each parameter group's gradient and update; count clipped steps.

Shapes: N label positions, D hidden, G parameter groups.
"""

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from qwlit.core.batch import StepBatch
from qwlit.core.sharding import local
from qwlit.training.milestones import Milestones
from qwlit.training.module import CausalLMModule

SAMPLED = 4096
"""Elements of each tensor whose update is measured, evenly spaced: under FSDP2 of each shard slice."""
ACTIVATION_NORM = "model/activation_norm"


class StepGauges(Callback):
    """Measures on the device; Telemetry, which comes after it in the list of callbacks, calls `take`."""

    def __init__(self, milestones: Milestones, max_grad_norm: float | None) -> None:
        self._milestones = milestones
        self._max_grad_norm = max_grad_norm
        self._hook: RemovableHandle | None = None
        self._groups: dict[str, list[nn.Parameter]] = {}
        self._samples: list[list[Tensor]] = []
        """Of each group views of the weights."""
        self._is_due = False
        """Whether the step that runs is logged."""
        self._activations = torch.zeros(2)
        """Square sum and number of elements of what the last layer returned in the step."""
        self._gradients = torch.zeros(0)
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
        self._samples = [[_sample(local(p.detach())) for p in parameters] for parameters in self._groups.values()]
        model = pl_module.loss_model
        self._hook = model.family.final_norm(model.causal_lm).register_forward_pre_hook(self._observe_last_layer)

    def on_train_end(self, trainer: Trainer, pl_module: CausalLMModule) -> None:
        self._remove_hook()

    def on_exception(self, trainer: Trainer, pl_module: CausalLMModule, exception: BaseException) -> None:
        self._remove_hook()

    def _remove_hook(self) -> None:
        # After a rollback the model gets another trainer, with gauges of its own.
        if self._hook is not None:
            self._hook.remove()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: CausalLMModule, batch: StepBatch, batch_idx: int
    ) -> None:
        self._is_due = self._milestones.log(batch.step + 1)
        self._activations = torch.zeros(2, dtype=torch.float64, device=pl_module.device)

    def _observe_last_layer(self, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Take the output of the last layer at the label positions (N, D) of one micro-batch."""
        if self._is_due:
            output = args[0].detach()
            square_sum = torch.linalg.vector_norm(output, dtype=torch.float32).double().square()
            self._activations += torch.stack([square_sum, torch.full_like(square_sum, output.numel())])

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: CausalLMModule, optimizer: Optimizer) -> None:
        if not self._is_due:
            return
        gradients = [[local(p.grad) for p in group if p.grad is not None] for group in self._groups.values()]
        scale = pl_module.loss_scale.factor if pl_module.loss_scale else 1.0
        norms = [nn.utils.get_total_norm(group, foreach=True) for group in gradients]
        self._gradients = (torch.stack(norms).double() / scale).square()
        self._before = [torch.cat(views) for views in self._samples]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: CausalLMModule, outputs: Any, batch: StepBatch, batch_idx: int
    ) -> None:
        skipped = pl_module.outcome.skipped
        clipped = (pl_module.outcome.grad_norm > (self._max_grad_norm or torch.inf)).float() * (1 - skipped)
        self._counts += torch.stack([clipped, skipped])
        self._num_steps += 1
        if self._is_due:
            self._is_due = False
            self._measured = self._measure(trainer.world_size, is_sharded=pl_module.is_sharded)
            self._before = []

    def _measure(self, world_size: int, *, is_sharded: bool) -> dict[str, Tensor]:
        after = [torch.cat(views) for views in self._samples]
        updates = [_square_sum(new - old) for new, old in zip(after, self._before, strict=True)]
        sums = torch.stack([self._gradients, torch.stack(updates), torch.stack([*map(_square_sum, self._before)])])
        if world_size > 1:
            dist.all_reduce(self._activations)
        if is_sharded:
            dist.all_reduce(sums)
        norms, updated, weights = sums.sqrt()
        # Weights that begin at 0, such as LoRA's B matrices, have no relative update.
        ratios = torch.where(weights > 0, updated / weights, 0)
        return {
            ACTIVATION_NORM: (self._activations[0] / self._activations[1]).sqrt(),
            **{f"optim/grad_norm/{name}": norm for name, norm in zip(self._groups, norms, strict=True)},
            **{f"optim/update_ratio/{name}": ratio for name, ratio in zip(self._groups, ratios, strict=True)},
        }

    def take(self) -> dict[str, Tensor]:
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
