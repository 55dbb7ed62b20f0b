"""One rank of an invariance run: trains the same tiny model under every layout; rank 0 saves what it saw.

Started by test_invariance.py as `python -m tests.invariance.worker OUT MODEL_TYPE …` with the ranks' environment set.
"""

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import torch

from qwlit.core.ranks import end_process, mark_process_group_joined
from qwlit.core.sharding import full_tensor
from qwlit.data.batches import StepDataset, train_loader
from qwlit.data.order import Order
from qwlit.data.step_plan import Limits, StepPlan
from qwlit.model.config import AdapterConfig, DropoutConfig, Execution, FreezeConfig, ModelConfig
from qwlit.model.loss_model import build_loss_model
from qwlit.model.shard import shard_model
from qwlit.optim.config import OptimConfig, SchedulerConfig
from qwlit.optim.schedules import Schedule
from qwlit.training.machine import Machine
from qwlit.training.module import CausalLMModule
from qwlit.training.resilience.spikes import SpikeDetector
from qwlit.training.trainer import build_trainer
from tests.long import LONG
from tests.tiny import tiny_architecture

# Some ranks of four have fewer of the ten samples, and the ten steps reach into a second epoch.
STEPS, BATCH, VOCABULARY, LR = 10, 10, 97, 1e-3
LIMITS = [Limits(max_samples=n) for n in (1, 3, 16)] + [Limits(max_tokens=n) for n in (64, 200, None)]
LAYOUTS = [(packing, limits) for packing in (True, False) for limits in LIMITS]
KINDS = [("qwen3", "none"), ("qwen2", "none"), ("qwen3", "lora")]


def layouts(model_type: str, adapter: str, world_size: int) -> list[tuple[bool, Limits]]:
    """All layouts of up to two ranks of the first kind; of the others each limit, packed or padded, unless LONG."""
    if LONG or ((model_type, adapter) == KINDS[0] and world_size <= 2):
        return LAYOUTS
    return LAYOUTS[0:6:2] + LAYOUTS[7:12:2]


class Ragged:
    """Samples of very different lengths with masks of very different shares."""

    def __init__(self) -> None:
        random = np.random.default_rng(1)
        self._lengths = random.integers(2, 60, size=70).astype(np.int32)
        self._ids = [random.integers(0, VOCABULARY, size=n).astype(np.int32) for n in self._lengths]
        self._masks = [(random.random(n) < random.random()).astype(np.uint8) for n in self._lengths]
        for mask in self._masks:
            mask[0], mask[-1] = 0, 1
        self._num_supervised = np.array([m.sum() for m in self._masks], dtype=np.int32)

    def __len__(self) -> int:
        return len(self._lengths)

    def lengths(self, ids: Any) -> Any:
        return self._lengths[ids]

    def num_supervised(self, ids: Any) -> Any:
        return self._num_supervised[ids]

    def read(self, ids: Any) -> tuple[Any, Any]:
        return np.concatenate([self._ids[i] for i in ids]), np.concatenate([self._masks[i] for i in ids])

    def origin(self, index: int) -> str:
        return f"ragged:{index}"


def plan_of(samples: Ragged, world_size: int, limits: Limits, *, packing: bool, batch: int = BATCH) -> StepPlan:
    return StepPlan(samples, Order.plain(5, len(samples)), batch, world_size, limits, packing)


class Recorder(lightning.Callback):
    """Keeps the first step's gradients and every step's loss over all ranks."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}
        self.losses: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if not self.gradients:
            self.gradients = {
                n: full_tensor(p.grad).clone() for n, p in module.named_parameters() if p.grad is not None
            }

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(module.outcome.loss))


LEVELS: list[dict[str, Any]] = [
    {"activation_checkpointing": "none", "offload_optimizer": False, "reduce_once": True},
    {"activation_checkpointing": "full", "offload_optimizer": True, "reduce_once": False},
    {"activation_checkpointing": "selective", "offload_optimizer": False, "reduce_once": False},
    {"activation_checkpointing": "offload", "offload_optimizer": True, "reduce_once": True},
]
"""Each layout of FSDP2 takes one of these levels of memory."""


def tiny(model_type: str, adapter: str, checkpointing: Any = "none") -> Any:
    architecture = tiny_architecture(model_type, tied=model_type == "qwen3")
    return build_loss_model(
        ModelConfig(init="random", architecture=architecture),
        AdapterConfig(kind=adapter),
        DropoutConfig(),
        FreezeConfig(),
        Execution("sdpa", checkpointing, torch.float32, torch.float32),
        seed=3,
    )


def machine(strategy: Any, world_size: int) -> Machine:
    return Machine(
        "cpu", "CPU", world_size, 1, strategy, "32-true", False, None, "none", 1800.0, num_workers=0, pin_memory=False
    )


def shard(strategy: str, model: Any) -> Any:
    return (lambda mesh: shard_model(model, mesh, bf16=False)) if strategy == "fsdp" else None


def run(
    model_type: str,
    adapter: str,
    packing: bool,
    limits: Limits,
    strategy: str,
    world_size: int,
    level: dict[str, Any] = LEVELS[0],
) -> dict[str, Any]:
    samples, recorder = Ragged(), Recorder()
    model = tiny(model_type, adapter, level["activation_checkpointing"])
    module = CausalLMModule(
        model,
        optim=OptimConfig(lr=LR, weight_decay=0.1, no_decay=("bias", "norm")),
        schedule=Schedule(SchedulerConfig(name="constant"), STEPS),
        max_grad_norm=1.0,
        loss_scale=None,
        shard=shard(strategy, model),
        seed=0,
        offload_optimizer=level["offload_optimizer"],
        reduce_once=level["reduce_once"],
    )
    trainer = build_trainer(machine(strategy, world_size), total_steps=STEPS, callbacks=[recorder], folder=Path())
    plan = plan_of(samples, world_size, limits, packing=packing)
    steps = StepDataset(samples, plan, trainer.global_rank, pad_id=0)
    trainer.fit(module, train_loader(steps, start_step=0, total_steps=STEPS, num_workers=0, pin_memory=False))
    weights = {n: full_tensor(p.detach()).clone() for n, p in module.named_parameters()}
    return {"gradients": recorder.gradients, "losses": recorder.losses, "weights": weights}


class Poison(torch.nn.Module):
    """A LossModel whose loss, but no gradient, turns infinite on the last rank at one step."""

    def __init__(self, loss_model: Any, rank: int, step: int) -> None:
        super().__init__()
        self.inner, self.rank, self.step, self.calls = loss_model, rank, step, 0

    def forward(self, micro: Any) -> Any:
        out = self.inner(micro)
        self.calls += 1
        bad = self.calls == self.step and torch.distributed.get_rank() == self.rank
        return out._replace(loss_sum=out.loss_sum + float("inf")) if bad else out


class Weights(lightning.Callback):
    """Keeps what the optimizer skipped and a copy of all weights after every step."""

    def __init__(self) -> None:
        self.skipped: list[float] = []
        self.after: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.skipped.append(float(module.outcome.skipped))
        self.after.append(torch.cat([full_tensor(p.detach()).flatten().clone() for p in module.parameters()]))


def run_poisoned(model_type: str, strategy: str, world_size: int) -> dict[str, Any]:
    """Train with one micro-batch a step, the fourth poisoned on the last rank."""
    samples, weights, model = Ragged(), Weights(), tiny(model_type, "none")
    module = CausalLMModule(
        Poison(model, world_size - 1, step=4),
        optim=OptimConfig(lr=LR),
        schedule=Schedule(SchedulerConfig(name="constant"), STEPS),
        max_grad_norm=1.0,
        loss_scale=None,
        shard=shard(strategy, model),
        seed=0,
        spikes=SpikeDetector(),
    )
    trainer = build_trainer(machine(strategy, world_size), total_steps=STEPS, callbacks=[weights], folder=Path())
    plan = plan_of(samples, world_size, Limits(), packing=True)
    steps = StepDataset(samples, plan, trainer.global_rank, pad_id=0)
    trainer.fit(module, train_loader(steps, start_step=0, total_steps=STEPS, num_workers=0, pin_memory=False))
    return {"skipped": weights.skipped, "after": weights.after}


def main(out: str, model_type: str, adapter: str, strategy: str, world_size: int, rank: int) -> None:
    torch.set_num_threads(1)
    if adapter == "poison":
        # Every rank saves what it saw.
        torch.save(run_poisoned(model_type, strategy, world_size), Path(f"{out}.{rank}"))
        leave_now()
    seen = {
        (packing, limits.max_samples, limits.max_tokens): run(
            model_type, adapter, packing, limits, strategy, world_size, LEVELS[index % 4 if strategy == "fsdp" else 0]
        )
        for index, (packing, limits) in enumerate(layouts(model_type, adapter, world_size))
    }
    levels = []
    if strategy == "fsdp":
        packing, limits = LAYOUTS[0]
        levels = [run(model_type, adapter, packing, limits, strategy, world_size, level) for level in LEVELS]
    if rank == 0:
        torch.save({"layouts": seen, "levels": levels}, Path(out))
    if world_size > 1:
        leave_now()


def leave_now() -> None:
    """End as the command line does: gloo's threads can abort a process while the interpreter takes itself apart."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    mark_process_group_joined()
    end_process(0)


if __name__ == "__main__":
    main(*sys.argv[1:5], int(sys.argv[5]), int(sys.argv[6]))
