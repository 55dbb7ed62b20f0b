"""trace.jsonl: samples, loss and gradient norm of each step, to the bit, to compare two runs step by step.

Written under determinism=reproducible and strict. It makes the host wait for the device at every step.
"""

import hashlib
import struct
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from qwlit.core.batch import StepBatch
from qwlit.core.sharding import full_tensor
from qwlit.training.milestones import Milestones
from qwlit.training.module import CausalLMModule
from qwlit.training.tracking.run_folder import RunFolder

PARAMETERS_EVERY = 100


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
    """Writes a record per step: a hash of the sample ids, the bits of loss sum and gradient norm.

    Every `PARAMETERS_EVERY` steps and at the last step it adds a hash of the weights.
    """

    def __init__(self, milestones: Milestones, folder: RunFolder) -> None:
        self._milestones = milestones
        self._folder = folder

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: CausalLMModule, outputs: Any, batch: StepBatch, batch_idx: int
    ) -> None:
        step = batch.step + 1
        ids = struct.pack(f"<{len(batch.sample_ids)}q", *batch.sample_ids)
        record = {
            "samples": hashlib.sha256(ids).hexdigest()[:16],
            "loss_sum": float_bits(float(pl_module.outcome.loss_sum)),
            "grad_norm": float_bits(float(pl_module.outcome.grad_norm)),
        }
        if step % PARAMETERS_EVERY == 0 or step == self._milestones.total_steps:
            record["parameters"] = parameters_hash(pl_module.trained_parameters())
        self._folder.append_trace(step, record)
