"""Fingerprints of all that a step computes, in the order in which it computes it, to find where two runs part."""

import json
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from qwlit.core.batch import MicroBatch, StepBatch
from qwlit.core.sharding import full_tensor
from qwlit.training.module import CausalLMModule
from qwlit.training.replay import floating, hooks

OBSERVE = "QWLIT_OBSERVE"
"""Environment variable that `diff` sets: an `Order` as JSON."""
CHUNK = 2**24
"""Elements of a tensor that are fingerprinted at once: 400 MB of integers."""
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Order:
    """What to observe."""

    first: int
    """The first observed step, counted from 1."""
    last: int
    folder: str
    """Gets records-RANK.json, and kept-RANK.pt: the first tensor that is not as in `reference`."""
    reference: str | None = None
    """The folder of the other run's records."""


class Key(NamedTuple):
    """What a fingerprint is of."""

    step: int
    """Counted from 1."""
    micro: int
    """The micro-batch on this rank, counted from 0."""
    what: str
    """weights, data, input, forward, backward, input gradient, gradient (of a parameter), or updated (weights)."""
    name: str
    """Of the module, the parameter or the part of the batch; "loss" for the head and the loss itself."""
    number: int
    """Tells the tensors of one module apart."""


def fingerprint(tensor: Tensor) -> int:
    """Return a 64-bit number that depends on every bit and its place. On every device it is the same.

    A sum of integers, each times an odd number that its place gives: it wraps around without rounding, so its order
    does not matter, and one changed element always changes it.
    """
    bits = tensor.detach().contiguous().reshape(-1).view(INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(bits), CHUNK):
        part = bits[start : start + CHUNK].long()
        places = torch.arange(start, start + len(part), device=tensor.device) * 0x1E3779B97F4A7C15
        total += (part * ((places ^ (places >> 29)) | 1)).sum()
    return int(total)


def read_records(folder: Path, rank: int) -> dict[Key, int]:
    """Return the fingerprints of a rank, in the order of the step; none where the run had no such rank."""
    file = folder / f"records-{rank}.json"
    records = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    return {Key(*key): value for *key, value in records}


class ObserveSteps(Callback):
    """Writes the records of the ordered steps, of each rank. No number of the training changes by it."""

    def __init__(self, order: str) -> None:
        self._order = Order(**json.loads(order))
        self._records: dict[Key, int] = {}
        self._reference: dict[Key, int] | None = None
        self._kept = self._in_forward = False
        self._step = self._micro = 0
        self._batch: MicroBatch
        self._hooks = ExitStack()
        self._trainer: Trainer

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: CausalLMModule, batch: StepBatch, batch_idx: int
    ) -> None:
        self._step, self._micro, self._trainer = batch.step + 1, -1, trainer
        if not self._is_due:
            return
        if self._step == self._order.first:
            # The guard may have gone back to before it.
            self._records.clear()
        if self._order.reference and self._reference is None:
            self._reference = read_records(Path(self._order.reference), trainer.global_rank)
        for name, tensor in (dict(pl_module.named_parameters()) | pl_module.trained_state()).items():
            self._add(name, "weights", tensor)
        model = pl_module.loss_model
        self._hooks.callback(model.register_forward_pre_hook(self._begin_forward).remove)
        self._hooks.callback(model.register_forward_hook(self._end_forward).remove)
        self._hooks.enter_context(hooks(model.causal_lm, self._add_floating, with_inputs=True))
        # Compiled layers would not call the hooks inside them.
        self._hooks.enter_context(torch.compiler.set_stance("force_eager"))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: CausalLMModule, optimizer: Any) -> None:
        for name, parameter in pl_module.named_parameters() if self._is_due else ():
            if parameter.grad is not None:
                self._add(name, "gradient", parameter.grad)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: CausalLMModule, outputs: Any, batch: StepBatch, batch_idx: int
    ) -> None:
        if not self._is_due:
            return
        self._hooks.close()
        for name, parameter in pl_module.named_parameters():
            self._add(name, "updated", parameter)
        file = Path(self._order.folder) / f"records-{trainer.global_rank}.json"
        file.write_text(json.dumps([[*key, value] for key, value in self._records.items()]), encoding="utf-8")

    @property
    def _is_due(self) -> bool:
        return self._order.first <= self._step <= self._order.last

    def _begin_forward(self, model: Any, args: tuple[MicroBatch, ...]) -> None:
        self._batch, self._in_forward = args[0], True
        self._micro += 1
        for name in ("input_ids", "position_ids", "label_positions", "targets"):
            self._add(name, "data", getattr(self._batch, name))

    def _end_forward(self, model: Any, args: Any, output: Any) -> None:
        self._add_floating("loss", "forward", output)
        output.loss_sum.register_hook(partial(self._add_floating, "loss", "backward"))
        self._in_forward = False

    def _add_floating(self, name: str, what: str, found: Any) -> None:
        # With activation checkpointing the backward pass computes the outputs a second time.
        if self._in_forward or what in ("backward", "input gradient"):
            for tensor in floating(found):
                self._add(name, what, tensor)

    def _add(self, name: str, what: str, tensor: Tensor) -> None:
        tensor = full_tensor(tensor.detach())
        tensor = tensor.to_dense() if tensor.is_sparse else tensor
        micro = self._micro if what in ("data", "input", "forward", "backward", "input gradient") else 0
        number = 0
        while (key := Key(self._step, micro, what, name, number)) in self._records:
            number += 1
        self._records[key] = fingerprint(tensor)
        if self._reference is None or self._kept:
            return
        if self._reference.get(key) not in (None, self._records[key]):
            self._kept = True
            self._keep(key, tensor)

    def _keep(self, key: Key, tensor: Tensor) -> None:
        """Write the tensor, and what tells which tokens of which samples it is of."""
        kept: dict[str, Any] = {"key": [*key], "tensor": tensor.cpu()}
        if key.what not in ("weights", "gradient", "updated"):
            plan, batch = self._trainer.datamodule.plan, self._batch  # type: ignore[attr-defined]
            kept["shape"], kept["labels"] = [*batch.input_ids.shape], batch.label_positions.cpu()
            kept["lengths"] = None if batch.document_lengths is None else [*batch.document_lengths]
            kept["samples"] = [plan.train.origin(sample) for sample in batch.sample_ids]
        torch.save(kept, Path(self._order.folder) / f"kept-{self._trainer.global_rank}.pt")
