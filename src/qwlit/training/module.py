"""The LightningModule: one Lightning batch is one optimizer step.

It uses manual optimization. The loss of a step is the sum over all its micro-batches, divided once by the step's
number of supervised tokens on all ranks. So every split into micro-batches and ranks gives the same gradient, up to
rounding.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from qwlit.core.batch import MicroBatch, StepBatch
from qwlit.core.copies import copies_of
from qwlit.core.metric import set_loss_key
from qwlit.core.sharding import full_tensor
from qwlit.model.loss_model import LossModel
from qwlit.model.shard import is_sharded
from qwlit.optim.config import OptimConfig
from qwlit.optim.groups import plan_groups
from qwlit.optim.host import HostOptimizer
from qwlit.optim.optimizers import build_optimizer, set_clip_and_skip, set_learning_rate
from qwlit.optim.schedules import Schedule
from qwlit.training.determinism import seed_micro_batch
from qwlit.training.loss_scale import LossScale
from qwlit.training.resilience.spikes import SpikeDetector

MOMENTS_OF_EACH_WEIGHT = {"exp_avg", "exp_avg_sq", "momentum_buffer", "state1", "state2"}
"""What the optimizers keep for each weight, in the parameter's shape (torch's names and bitsandbytes')."""
SPIKE_HISTORY = "spike_history"
"""Key of the checkpoint."""


@dataclass(frozen=True)
class StepOutcome:
    """The results of one step, on the device, so that the host does not wait for them."""

    loss_sum: Tensor
    """float32 scalar: sum over the step's supervised tokens on all ranks, nats."""
    loss: Tensor
    """float32 scalar: the mean over these tokens."""
    grad_norm: Tensor
    """float32 scalar: total norm over all ranks, before clipping."""
    skipped: Tensor
    """float32 scalar: 1.0 where the optimizer skipped the step."""
    spike: Tensor
    """float32 scalar: 1.0 where it skipped the step because its norm or loss was far above that of the steps before."""
    nonfinite: Tensor
    """float32 scalar: 1.0 where loss or gradient was not finite and float16's loss scale was not the cause."""
    lr: float
    """Learning rate of parameters without a rule of their own."""


@dataclass
class ValidationSums:
    """Sums over the validation sets so far."""

    names: tuple[str, ...]
    """Names of the sets; a set without a name has the name ""."""
    sums: Tensor
    """float64 (sets, 3): loss, supervised tokens, correct tokens."""

    @property
    def loss(self) -> float:
        """The mean over the supervised tokens of all sets."""
        loss, supervised, _ = self.sums.sum(0)
        return float(loss / supervised)

    @property
    def accuracy(self) -> float:
        """The share of correct tokens among the supervised tokens of all sets, 0 to 1."""
        _, supervised, correct = self.sums.sum(0)
        return float(correct / supervised)

    @property
    def set_losses(self) -> dict[str, float]:
        """The loss of each set with a name."""
        losses = (self.sums[:, 0] / self.sums[:, 1]).tolist()
        return {name: loss for name, loss in zip(self.names, losses, strict=True) if name}


class CausalLMModule(lightning.LightningModule):
    """Trains a LossModel with the batches of the step plan."""

    def __init__(  # noqa: PLR0913 - all but the model are named
        self,
        loss_model: LossModel,
        *,
        optim: OptimConfig,
        schedule: Schedule,
        max_grad_norm: float | None,
        loss_scale: LossScale | None,
        shard: Callable[[DeviceMesh], None] | None,
        seed: int,
        spikes: SpikeDetector | None = None,
        offload_optimizer: bool = False,
        reduce_once: bool = True,
        validation_sets: Sequence[str] = ("",),
        callbacks: Sequence[Callback] = (),
    ) -> None:
        """Build the module.

        Args:
            spikes: finds the steps to skip; None: no step is skipped but float16's overflows.
            offload_optimizer: keep the moments in the host's memory, and step there.
            reduce_once: under FSDP2, reduce the gradients over ranks once per step, which keeps them unsharded until
                then; else after every micro-batch.
            validation_sets: names of the validation sets, in the order of their loaders; "" for a set without one.
            callbacks: those that the module adds to its Trainer.
        """
        super().__init__()
        self.automatic_optimization = False
        # Checkpoints hold only trained weights; a resumed run loads frozen weights from the model folder again.
        self.strict_loading = False
        self.loss_model = loss_model
        self._optim = optim
        self._schedule = schedule
        self._max_grad_norm = max_grad_norm
        self.loss_scale = loss_scale
        self._shard = shard
        self._seed = seed
        self.spikes = spikes
        self._offload_optimizer = offload_optimizer
        self._reduce_once = reduce_once
        self._validation_sets = tuple(validation_sets)
        self._callbacks = list(callbacks)
        self.outcome: StepOutcome
        self.validation: ValidationSums

    def configure_callbacks(self) -> list[Callback]:
        return self._callbacks

    def configure_model(self) -> None:
        """Shard the model under FSDP2. Lightning calls this once the process group exists, before the optimizer."""
        if self._shard is not None:
            # The optimizer must get the sharded parameters, and Lightning may call this hook again.
            self._shard(self.device_mesh["data_parallel"])
            self._shard = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        names = ((name.rpartition("causal_lm.")[2], p) for name, p in self.loss_model.named_parameters())
        to_host = copies_of(self.device) if self._offload_optimizer else None
        return build_optimizer(plan_groups(names, self._optim), self._optim, to_host)

    def training_step(self, batch: StepBatch, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        lr_multiplier = self._schedule.lr_multiplier(batch.step)
        set_learning_rate(optimizer.optimizer, lr_multiplier)
        loss_sum = torch.zeros((), device=self.device)
        last = len(batch.micro_batches) - 1
        # Every rank has the same number of micro-batches, so the collectives of forward and backward match.
        for index, micro in enumerate(batch.micro_batches):
            seed_micro_batch(self._seed, batch.step, self.global_rank, index)
            if index == last and isinstance(optimizer.optimizer, HostOptimizer):
                optimizer.optimizer.begin_last_backward()
            with self._gradient_sync(index == last):
                loss_sum += self._backward(micro, batch.num_supervised_tokens)
        gradients = [p.grad for p in self.loss_model.parameters() if p.grad is not None]
        scale = self.loss_scale.factor if self.loss_scale else 1.0
        # After the last backward pass every rank has the reduced gradients (FSDP2: its slices; full_tensor sums them).
        # Nothing up to zero_grad waits for the device.
        grad_norm = full_tensor(nn.utils.get_total_norm(gradients, foreach=True)) / scale
        loss_sum, grad_norm = self._over_ranks(loss_sum, grad_norm)
        loss = loss_sum / batch.num_supervised_tokens
        nonfinite = (~(torch.isfinite(grad_norm) & torch.isfinite(loss))).float()
        spike = torch.zeros_like(nonfinite) if self.spikes is None else self.spikes.judge(grad_norm, loss)
        skipped = torch.maximum(spike, nonfinite * self._skips_nonfinite)
        set_clip_and_skip(optimizer.optimizer, grad_norm, self._max_grad_norm, skipped, scale)
        optimizer.step()
        optimizer.zero_grad()
        if self.loss_scale is not None:
            nonfinite = self._rescale(nonfinite, loss)
        lr = self._optim.lr * lr_multiplier
        self.outcome = StepOutcome(loss_sum, loss, grad_norm, skipped, spike, nonfinite, lr)

    @property
    def _skips_nonfinite(self) -> bool:
        # With guard=off a step that is not finite changes the weights, but a float16 overflow never does.
        return self.spikes is not None or self.loss_scale is not None

    def _over_ranks(self, loss_sum: Tensor, grad_norm: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss sum of all ranks, and their mean gradient norm; all of them clip and skip by the same norm.

        The ranks' norms are equal, so their mean is the norm itself; a value that only one rank has, by a fault of its
        device, reaches all of them. In float64 the mean of equal float32 numbers is exact.
        """
        if self.trainer.world_size == 1:
            return loss_sum, grad_norm
        both = torch.stack([loss_sum.double(), grad_norm.double()])
        torch.distributed.all_reduce(both)
        return both[0].float(), (both[1] / self.trainer.world_size).float()

    def _rescale(self, nonfinite: Tensor, loss: Tensor) -> Tensor:
        """Update float16's loss scale after a step; return 1.0 where the loss scale does not explain the overflow."""
        assert self.loss_scale is not None
        explained = self.loss_scale.explains_overflow
        self.loss_scale.update(overflow=bool(nonfinite))
        # The loss is computed before scaling: where it is not finite, a smaller scale does not help.
        return (~torch.isfinite(loss)).float() if explained else nonfinite

    def _backward(self, micro: MicroBatch, num_supervised_tokens: int) -> Tensor:
        """Accumulate this micro-batch's share of the step's gradient; return its loss sum."""
        loss_sum: Tensor = self.loss_model(micro).loss_sum
        # DDP and FSDP2 average over ranks, so multiply by the world size. A loss that is not finite makes the factor
        # NaN, and then every gradient on every rank is NaN: all ranks see the same norm and skip the step together.
        scale = self.loss_scale.factor if self.loss_scale else 1.0
        factor = scale * self.trainer.world_size / num_supervised_tokens + 0.0 * loss_sum.detach()
        self.manual_backward(loss_sum * factor)
        return loss_sum.detach()

    def _gradient_sync(self, enabled: bool) -> AbstractContextManager[None]:
        """Reduce the gradients over ranks only in the last micro-batch; under FSDP2 in each where that is planned."""
        if self.is_sharded:
            self.loss_model.set_requires_gradient_sync(enabled or not self._reduce_once)  # type: ignore[operator]
        wrapper = self.trainer.model
        if enabled or not isinstance(wrapper, DistributedDataParallel):
            return nullcontext()
        return wrapper.no_sync()  # type: ignore[no-any-return]

    def on_validation_epoch_start(self) -> None:
        sums = torch.zeros((len(self._validation_sets), 3), dtype=torch.float64, device=self.device)
        self.validation = ValidationSums(self._validation_sets, sums)

    def validation_step(self, micro: MicroBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        out = self.loss_model(micro)
        sums = self.validation.sums[dataloader_idx]
        sums[0] += out.loss_sum
        sums[1] += len(micro.targets)
        sums[2] += out.num_correct

    def on_validation_epoch_end(self) -> None:
        if self.is_sharded:
            # FSDP2 keeps the root's weights whole after a forward pass until the backward pass, which validation does
            # not have. A checkpoint may follow, and it must save shard slices.
            self.loss_model.reshard()  # type: ignore[operator]
        # Every rank ends its validation here, also a rank with fewer micro-batches.
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(self.validation.sums)
        # EarlyStopping and ModelCheckpoint read it when the validation ends; Telemetry writes it to the loggers.
        self.log("val/loss", self.validation.loss, prog_bar=True, logger=False)
        for name, loss in self.validation.set_losses.items():
            self.log(set_loss_key(name), loss, logger=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = self.trained_parameters()
        # Torch numbers the optimizer's states in the order of its groups.
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        groups = self.optimizers(use_pl_optimizer=False).param_groups  # type: ignore[union-attr]
        checkpoint["optimizer_parameters"] = [names[id(p)] for group in groups for p in group["params"]]
        if self.loss_scale:
            checkpoint["loss_scale"] = asdict(self.loss_scale)
        if self.spikes is not None and self.spikes.history is not None:
            checkpoint[SPIKE_HISTORY] = self.spikes.history.cpu()

    def trained_parameters(self) -> dict[str, Tensor]:
        """Return the trained parameters by the module's own names; tied weights occur once."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds shard slices only."""
        return is_sharded(self.loss_model)

    def trained_state(self) -> dict[str, Tensor]:
        """Return the trained parameters and the optimizer's tensors, by names for messages."""
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        state = self.optimizers(use_pl_optimizer=False).state  # type: ignore[union-attr]
        moments = {
            f"{key} of {names[id(parameter)]}": value
            for parameter, values in state.items()
            for key, value in values.items()
            if isinstance(value, Tensor)
        }
        return self.trained_parameters() | moments

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        expected = {name: tuple(tensor.shape) for name, tensor in self.trained_parameters().items()}
        found = {name: tuple(tensor.shape) for name, tensor in checkpoint["state_dict"].items()}
        if different := sorted(name for name, _ in expected.items() ^ found.items()):
            raise RuntimeError(f"checkpoint and model differ in {different[0]}")
        (optimizer,) = checkpoint["optimizer_states"]
        for index, moments in optimizer["state"].items():
            name = checkpoint["optimizer_parameters"][index]
            for key in MOMENTS_OF_EACH_WEIGHT & moments.keys():
                if tuple(moments[key].shape) != expected[name]:
                    raise RuntimeError(f"{key} of {name} has the shape {tuple(moments[key].shape)}")
        if self.loss_scale and "loss_scale" in checkpoint:
            self.loss_scale = LossScale(**checkpoint["loss_scale"])
        if self.spikes is not None and SPIKE_HISTORY in checkpoint:  # checkpoints of earlier versions lack it
            self.spikes.load(checkpoint[SPIKE_HISTORY])
