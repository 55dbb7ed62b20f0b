"""Checkpoints: folders that are either whole or not there.

A checkpoint is written beside its place on the same file system, synced, and renamed into it. `MANIFEST.json` is
written last inside it and lists every file with its size and sha256.
"""

import hashlib
import math
import os
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import CheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qwlit.core.errors import ConfigError
from qwlit.core.files import fsync_folder, write_json_atomic
from qwlit.core.ranks import is_rank_zero
from qwlit.training.boundary import BoundaryCallback
from qwlit.training.config import CheckpointConfig
from qwlit.training.milestones import Milestones
from qwlit.training.module import CausalLMModule
from qwlit.training.run_folder import RunFolder

MANIFEST = "MANIFEST.json"
WEIGHTS = "model.safetensors"
STATE = "training_state.pt"
# The module's names are this prefix and the Hugging Face name; files carry the latter.
PREFIX = "loss_model.causal_lm."


def step_of(checkpoint: Path) -> int:
    """Return the number of steps made when `checkpoint` (step-000100) was written."""
    return int(checkpoint.name.removeprefix("step-"))


def list_checkpoints(folder: RunFolder) -> list[Path]:
    """Return the whole checkpoints, oldest first."""
    whole = (p.parent for p in folder.checkpoints.glob(f"step-*/{MANIFEST}"))
    return sorted((p for p in whole if p.name.removeprefix("step-").isdigit()), key=step_of)


def read_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the trained weights by their Hugging Face names."""
    return load_file(checkpoint / WEIGHTS)


class StepFolderIO(CheckpointIO):
    """Lightning's checkpoint dictionary as a folder: weights as safetensors, the rest as a pickle-free torch file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        final = Path(path)
        temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        weights = {name.removeprefix(PREFIX): t.contiguous() for name, t in checkpoint.pop("state_dict").items()}
        save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
        torch.save(checkpoint, temporary / STATE)
        files = {name: _seal(temporary / name) for name in (WEIGHTS, STATE)}
        write_json_atomic(temporary / MANIFEST, {"step": checkpoint["global_step"], "files": files})
        fsync_folder(temporary)
        temporary.rename(final)
        fsync_folder(final.parent)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        folder = Path(path)
        try:
            checkpoint: dict[str, Any] = torch.load(folder / STATE, map_location="cpu", weights_only=True)
            checkpoint["state_dict"] = {PREFIX + name: tensor for name, tensor in read_weights(folder).items()}
        except (OSError, EOFError, RuntimeError, UnpicklingError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{folder} is damaged ({reason}); remove it to go on from the one before") from None
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        # Renamed first: a folder half deleted must not be taken for a checkpoint.
        doomed = Path(path).with_name(f".{Path(path).name}.tmp")
        Path(path).rename(doomed)
        shutil.rmtree(doomed)


def clear_leftovers(folder: RunFolder) -> None:
    """Remove what a kill -9 left half written or half deleted."""
    for leftover in folder.checkpoints.glob(".*.tmp"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    for checkpoint in folder.checkpoints.glob("step-*"):
        if not (checkpoint / MANIFEST).exists():
            shutil.rmtree(checkpoint)


def _seal(path: Path) -> dict[str, Any]:
    """Sync a file to the disk and describe it."""
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def point(folder: RunFolder, name: str, checkpoint: Path) -> None:
    """Make `checkpoints/<name>` a link to `checkpoint`, in one move."""
    temporary = folder.checkpoints / f".{name}.{os.getpid()}.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(checkpoint.name)
    temporary.replace(folder.checkpoints / name)


def pointed(folder: RunFolder, name: str) -> Path | None:
    """Return the checkpoint that `best` or `last` points to."""
    link = folder.checkpoints / name
    return link.resolve() if link.exists() else None


class Checkpointing(BoundaryCallback):
    """Saves when due, when val/loss is the best so far, and when asked to; keeps the newest and the best."""

    def __init__(self, config: CheckpointConfig, milestones: Milestones, folder: RunFolder) -> None:
        super().__init__(milestones)
        self._keep_last = config.keep_last
        self._folder = folder
        self._saved_step = 0
        self.best_val_loss: float | None = None
        self.best_step: int | None = None
        self._stopped_early = False

    def state_dict(self) -> dict[str, Any]:
        return {"best_val_loss": self.best_val_loss, "best_step": self.best_step, "stopped_early": self._stopped_early}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_val_loss = state_dict["best_val_loss"]
        self.best_step = state_dict["best_step"]
        self._stopped_early = state_dict["stopped_early"]
        if is_rank_zero():
            # A kill between a save and its pointers leaves them behind.
            point(self._folder, "last", list_checkpoints(self._folder)[-1])
            if self.best_step is not None:
                point(self._folder, "best", self._path(self.best_step))

    def on_train_start(self, trainer: Trainer, pl_module: CausalLMModule) -> None:
        # A run killed between early stopping and its end has nothing left to train.
        trainer.should_stop = trainer.should_stop or self._stopped_early

    def on_step_boundary(self, trainer: Trainer, module: CausalLMModule, step: int) -> None:
        self._stopped_early = trainer.should_stop
        improved = self.milestones.validate(step) and self._improved(module, step)
        # Early stopping ends the run here, so here is the last step.
        if improved or self.milestones.save(step) or trainer.should_stop:
            self.save(trainer, step)

    def _improved(self, module: CausalLMModule, step: int) -> bool:
        loss = module.validation.loss
        if not math.isfinite(loss) or (self.best_val_loss is not None and loss >= self.best_val_loss):
            return False
        self.best_val_loss, self.best_step = loss, step
        return True

    def save(self, trainer: Trainer, step: int) -> None:
        """Write the checkpoint of this step, unless it is there, and let go of those no longer kept."""
        if step == self._saved_step:
            return
        trainer.save_checkpoint(self._path(step))
        self._saved_step = step
        if is_rank_zero():
            point(self._folder, "last", self._path(step))
            if self.best_step == step:
                point(self._folder, "best", self._path(step))
            self._folder.append_event(step, "checkpoint", path=str(self._path(step).relative_to(self._folder.path)))
            self._prune(trainer)

    @property
    def best_checkpoint(self) -> Path | None:
        """The checkpoint with the lowest val/loss, None before the first validation."""
        return None if self.best_step is None else self._path(self.best_step)

    def _path(self, step: int) -> Path:
        return self._folder.checkpoints / f"step-{step:06d}"

    def _prune(self, trainer: Trainer) -> None:
        for checkpoint in list_checkpoints(self._folder)[: -self._keep_last]:
            if step_of(checkpoint) != self.best_step:
                trainer.strategy.remove_checkpoint(checkpoint)
