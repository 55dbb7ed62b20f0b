"""trace.jsonl: samples, loss and gradient norm of each step, to the bit, to compare two runs step by step."""

import hashlib
import struct
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from qwlit.core.batch import StepBatch
from qwlit.core.sharding import full_tensor
from qwlit.training.async_readback import AsyncReadback
from qwlit.training.config import TraceConfig
from qwlit.training.module import CausalLMModule
from qwlit.training.tracking.run_folder import RunFolder


def float_bits(value: float) -> str:
    """Return a float32's bits as 8 hexadecimal digits."""
    return struct.pack(">f", value).hex()


def parameters_hash(tensors: dict[str, Tensor]) -> str:
    """Return 16 hexadecimal digits of the sha256 of names and bytes. A collective where tensors are sharded."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(full_tensor(tensor).detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class DeterminismTrace(Callback):
    """Writes a record per traced step: a hash of the sample ids, the bits of loss sum and gradient norm.

    Some records have a hash of the weights, for which the host waits; the other numbers come a step later.
    """

    def __init__(self, config: TraceConfig, total_steps: int, folder: RunFolder) -> None:
        self._every_steps = config.every_steps or 1
        self._weights_every_steps = config.weights_every_steps
        self._total_steps = total_steps
        self._folder = folder
        self._reader: AsyncReadback[tuple[int, dict[str, str]]] = AsyncReadback()

    def state_dict(self) -> dict[str, Any]:
        self._write(wait=True)
        return {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: CausalLMModule, outputs: Any, batch: StepBatch, batch_idx: int
    ) -> None:
        step = batch.step + 1
        is_last = step == self._total_steps
        has_weights = step % self._weights_every_steps == 0 or is_last
        if has_weights or step % self._every_steps == 0:
            ids = struct.pack(f"<{len(batch.sample_ids)}q", *batch.sample_ids)
            record = {"samples": hashlib.sha256(ids).hexdigest()[:16]}
            if has_weights:
                record["parameters"] = parameters_hash(pl_module.trained_parameters())
            self._reader.push((step, record), torch.stack([pl_module.outcome.loss_sum, pl_module.outcome.grad_norm]))
        self._write(wait=is_last)

    def on_train_end(self, trainer: Trainer, pl_module: CausalLMModule) -> None:
        self._write(wait=True)

    def on_exception(self, trainer: Trainer, pl_module: CausalLMModule, exception: BaseException) -> None:
        self._write(wait=True)

    def _write(self, *, wait: bool) -> None:
        for (step, record), (loss_sum, grad_norm) in self._reader.pop(wait=wait):
            numbers = {"loss_sum": float_bits(loss_sum), "grad_norm": float_bits(grad_norm)}
            self._folder.append_trace(step, record | numbers)
