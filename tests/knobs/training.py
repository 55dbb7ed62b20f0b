"""A short training of a tiny model with any knob turned, and what it did."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import Tensor

from qwlit.data.batches import StepDataset, train_loader
from qwlit.data.step_plan import Limits
from qwlit.model.config import AdapterConfig, DropoutConfig, Execution, FreezeConfig, ModelConfig
from qwlit.model.loss_model import LossModel, build_loss_model
from qwlit.optim.config import OptimConfig, SchedulerConfig
from qwlit.optim.schedules import Schedule
from qwlit.training.checkpointing.writer import CheckpointWriter
from qwlit.training.module import CausalLMModule
from qwlit.training.trainer import build_trainer
from tests.invariance.worker import Ragged, machine, plan_of
from tests.tiny import tiny_architecture

STEPS, WARMUP, SAVED, LR = 12, 3, 5, 3e-3


@dataclass(frozen=True)
class Knobs:
    """What is not as usual."""

    optim: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)
    dropout: dict[str, Any] = field(default_factory=dict)
    freeze: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    memory: Any = "none"


class Watch(lightning.Callback):
    """Keeps losses and every group's rate, and saves once on the way."""

    def __init__(self, checkpoint: Path | None) -> None:
        self.losses: list[float] = []
        self.rates: list[dict[str, float]] = []
        self._checkpoint = checkpoint

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(module.outcome.loss_sum) / batch.num_supervised_tokens)
        groups = module.optimizers(use_pl_optimizer=False).param_groups
        self.rates.append({group["name"]: group["lr"] for group in groups})
        if self._checkpoint and trainer.global_step == SAVED:
            trainer.save_checkpoint(self._checkpoint)


@dataclass(frozen=True)
class Trained:
    losses: list[float]
    rates: list[dict[str, float]]
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    model: LossModel


def build(family: str, knobs: Knobs) -> LossModel:
    # Large enough for 8-bit moments, which begin at 4,096 numbers, and in whole blocks of 4-bit weights.
    shape = replace(tiny_architecture(family, tied=family == "qwen3"), hidden_size=64, intermediate_size=128)
    return build_loss_model(
        ModelConfig(init="random", architecture=shape),
        AdapterConfig(rank=4, **knobs.adapter),
        DropoutConfig(**knobs.dropout),
        FreezeConfig(**knobs.freeze),
        Execution("sdpa", knobs.memory, torch.float32, torch.float32),
        seed=3,
    )


def weights(model: LossModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.causal_lm.named_parameters()}


def trained(family: str, knobs: Knobs, *, save: Path | None = None, resume: Path | None = None) -> Trained:
    model, samples, watch = build(family, knobs), Ragged(), Watch(save)
    before = weights(model)
    module = CausalLMModule(
        model,
        optim=OptimConfig(**({"lr": LR, "weight_decay": 0.1, "no_decay": ("bias", "norm")} | knobs.optim)),
        schedule=Schedule(SchedulerConfig(**({"name": "linear", "warmup_steps": WARMUP} | knobs.scheduler)), STEPS),
        max_grad_norm=1.0,
        loss_scale=None,
        shard=None,
        seed=0,
    )
    writer = CheckpointWriter()
    trainer = build_trainer(machine("single", 1), total_steps=STEPS, callbacks=[watch], folder=Path(), writer=writer)
    steps = StepDataset(samples, plan_of(samples, 1, Limits(max_samples=8), packing=True), 0, pad_id=0)
    loader = train_loader(steps, start_step=SAVED if resume else 0, total_steps=STEPS, num_workers=0, pin_memory=False)
    trainer.fit(module, loader, ckpt_path=resume, weights_only=True)
    assert writer.finish() is None
    return Trained(watch.losses, watch.rates, before, weights(model), model)
