"""Checkpoints: folders that are either complete or absent.

A checkpoint is written into a temporary folder on the same file system, synced, and renamed. `MANIFEST.json` is the
last file written and lists every other file with its size and sha256.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import CheckpointIO
from safetensors import SafetensorError

from qwlit.core.errors import ConfigError
from qwlit.core.files import fsync_folder, write_json_atomic
from qwlit.core.ranks import is_rank_zero
from qwlit.training.checkpointing.shards import ShardReader, write_shard
from qwlit.training.config import CheckpointConfig
from qwlit.training.milestones import Milestones
from qwlit.training.module import CausalLMModule
from qwlit.training.step_boundary import BoundaryCallback
from qwlit.training.tracking.run_folder import RunFolder

MANIFEST = "MANIFEST.json"
WEIGHTS, MOMENTS = "model", "optimizer"
"""File names before `.safetensors`, or before `-00001-of-00002.safetensors` where each rank wrote its shard slices."""
STATE = "training_state.pt"
# The module's parameter names have this prefix before the Hugging Face name; the files have Hugging Face names.
PREFIX = "loss_model.causal_lm."


def step_of(checkpoint: Path) -> int:
    """Return the number of steps done when `checkpoint` (step-000100) was written."""
    return int(checkpoint.name.removeprefix("step-"))


def list_checkpoints(folder: RunFolder) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    complete = (p.parent for p in folder.checkpoints.glob(f"step-*/{MANIFEST}"))
    return sorted((p for p in complete if p.name.removeprefix("step-").isdigit()), key=step_of)


def find_damage(checkpoint: Path) -> str | None:
    """Compare a checkpoint's files with its manifest; return what is wrong, None where nothing is."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, description in files.items():
            if _describe(checkpoint / name) != description:
                return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    return None


def read_weights(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Read the trained weights by their Hugging Face names, one at a time."""
    with ShardReader(checkpoint, WEIGHTS) as weights:
        for name in weights.names():
            yield name, weights.read(name)


def write_checkpoint(checkpoint: dict[str, Any], final: Path, *, rank: int = 0, count: int = 1) -> None:
    """Write Lightning's checkpoint dictionary as a folder: tensors as safetensors, the rest as a torch file.

    Args:
        rank, count: this rank, and how many ranks write together; each writes its shard slices.
    """
    temporary = final.with_name(f".{final.name}.tmp")
    # Rank 0 creates the folder, all ranks write into it, and rank 0 renames it when the last file is on the disk. The
    # barriers keep this order; they are safe because all ranks save at the same step boundary.
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    _wait_for_all(count)
    weights = {name.removeprefix(PREFIX): t for name, t in checkpoint.pop("state_dict").items()}
    (optimizer,) = checkpoint.pop("optimizer_states")
    names = [name.removeprefix(PREFIX) for name in checkpoint["optimizer_parameters"]]
    state = {f"{key}.{names[i]}": v for i, values in optimizer["state"].items() for key, v in values.items()}
    moments = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    # bitsandbytes counts its steps in Python numbers.
    numbers = {key: value for key, value in state.items() if key not in moments}
    written = [
        write_shard(temporary, stem, tensors, rank=rank, count=count)
        for stem, tensors in ((WEIGHTS, weights), (MOMENTS, moments))
    ]
    files = _gather({file.name: _sync_and_describe(file) for file in written}, count)
    if rank == 0:
        kept = {"optimizer_groups": optimizer["param_groups"], "optimizer_numbers": numbers}
        torch.save(checkpoint | kept, temporary / STATE)
        files[STATE] = _sync_and_describe(temporary / STATE)
        write_json_atomic(temporary / MANIFEST, {"step": checkpoint["global_step"], "files": files})
        fsync_folder(temporary)
        temporary.rename(final)
        fsync_folder(final.parent)
    _wait_for_all(count)


def _wait_for_all(count: int) -> None:
    if count > 1:
        torch.distributed.barrier()


def _gather(mine: dict[str, Any], count: int) -> dict[str, Any]:
    """Return the entries of all ranks, on every rank."""
    if count == 1:
        return mine
    everywhere: list[Any] = [None] * count
    torch.distributed.all_gather_object(everywhere, mine)
    return {name: entry for entries in everywhere for name, entry in entries.items()}


def read_checkpoint(folder: Path, template: dict[str, torch.Tensor] | None = None) -> dict[str, Any]:
    """Read a checkpoint that any number of ranks wrote.

    Args:
        template: the parameters by name; the tensors get the same sharding. None: read whole tensors.

    Raises:
        ConfigError: the checkpoint is damaged.
    """
    try:
        checkpoint: dict[str, Any] = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        names = checkpoint["optimizer_parameters"]
        with ShardReader(folder, WEIGHTS) as weights, ShardReader(folder, MOMENTS) as moments:

            def read(reader: ShardReader, key: str, name: str) -> torch.Tensor:
                # AdamW's step count is a scalar, so it is not sharded.
                if template is None or key.startswith("step."):
                    return reader.read(key)
                return reader.read_as(key, template[PREFIX + name])

            checkpoint["state_dict"] = {PREFIX + name: read(weights, name, name) for name in weights.names()}
            tensors = {key: read(moments, key, key.partition(".")[2]) for key in moments.names()}
            indices = {name.removeprefix(PREFIX): index for index, name in enumerate(names)}
            state: dict[int, dict[str, Any]] = {}
            for key, value in (tensors | checkpoint.pop("optimizer_numbers", {})).items():
                kind, _, name = key.partition(".")
                state.setdefault(indices[name], {})[kind] = value
    except (OSError, EOFError, RuntimeError, KeyError, UnpicklingError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{folder} is damaged ({reason}); remove it to resume from the checkpoint before") from None
    checkpoint["optimizer_states"] = [{"state": state, "param_groups": checkpoint.pop("optimizer_groups")}]
    return checkpoint


class StepFolderIO(CheckpointIO):
    """Lightning's checkpoint plugin for strategies in which rank 0 holds all tensors."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write_checkpoint(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        _delete(Path(path))


def _delete(checkpoint: Path) -> None:
    """Delete a checkpoint. Rename it first, so that a half-deleted folder never looks like a checkpoint."""
    renamed = checkpoint.with_name(f".{checkpoint.name}.tmp")
    checkpoint.rename(renamed)
    shutil.rmtree(renamed)


def remove_unfinished_checkpoints(folder: RunFolder) -> None:
    """Remove checkpoints that a kill -9 left half written or half deleted."""
    for leftover in folder.checkpoints.glob(".*.tmp"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    for checkpoint in folder.checkpoints.glob("step-*"):
        if not (checkpoint / MANIFEST).exists():
            shutil.rmtree(checkpoint)


def _sync_and_describe(path: Path) -> dict[str, Any]:
    """Sync a file to the disk; return its size and sha256."""
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
    return _describe(path)


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def link_checkpoint(folder: RunFolder, name: str, checkpoint: Path) -> None:
    """Make `checkpoints/<name>` a link to `checkpoint`, atomically."""
    temporary = folder.checkpoints / f".{name}.{os.getpid()}.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(checkpoint.name)
    temporary.replace(folder.checkpoints / name)


def linked_checkpoint(folder: RunFolder, name: str) -> Path | None:
    """Return the checkpoint that the link `best` or `last` points to; None where there is no such link."""
    link = folder.checkpoints / name
    return link.resolve() if link.exists() else None


class Checkpointing(BoundaryCallback):
    """Saves at due steps, at the best val/loss so far, and on request; keeps the newest checkpoints and the best."""

    def __init__(
        self,
        config: CheckpointConfig,
        milestones: Milestones,
        folder: RunFolder,
        on_saved: Callable[[Path], None] | None = None,
    ) -> None:
        """`on_saved` is called on rank 0 with every new checkpoint, before older ones are deleted."""
        super().__init__(milestones)
        self._keep_last = config.keep_last
        self._on_saved = on_saved
        self._folder = folder
        self._saved_step = 0
        self.best_val_loss: float | None = None
        self.best_step: int | None = None
        self.best_set_losses: dict[str, float] = {}
        """The loss of each named validation set at `best_step`."""
        self._stopped_early = False

    def state_dict(self) -> dict[str, Any]:
        return {
            "best_val_loss": self.best_val_loss,
            "best_step": self.best_step,
            "best_set_losses": self.best_set_losses,
            "stopped_early": self._stopped_early,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_val_loss = state_dict["best_val_loss"]
        self.best_step = state_dict["best_step"]
        self.best_set_losses = state_dict.get("best_set_losses", {})  # older checkpoints do not have it
        self._stopped_early = state_dict["stopped_early"]
        if is_rank_zero():
            # A kill after a save and before its links leaves the links at an older checkpoint.
            link_checkpoint(self._folder, "last", list_checkpoints(self._folder)[-1])
            if self.best_step is not None:
                link_checkpoint(self._folder, "best", self._path(self.best_step))

    def on_train_start(self, trainer: Trainer, pl_module: CausalLMModule) -> None:
        # A run that was killed after early stopping and before its end must not train further.
        trainer.should_stop = trainer.should_stop or self._stopped_early

    def on_step_boundary(self, trainer: Trainer, module: CausalLMModule, step: int) -> None:
        self._stopped_early = trainer.should_stop
        improved = self.milestones.validate(step) and self._improved(module, step)
        # If early stopping ends the run here, this is the last step, which is always saved.
        if improved or self.milestones.save(step) or trainer.should_stop:
            self.save(trainer, step)

    def _improved(self, module: CausalLMModule, step: int) -> bool:
        loss = module.validation.loss
        if not math.isfinite(loss) or (self.best_val_loss is not None and loss >= self.best_val_loss):
            return False
        self.best_val_loss, self.best_step = loss, step
        self.best_set_losses = module.validation.set_losses
        return True

    def save(self, trainer: Trainer, step: int) -> None:
        """Write the checkpoint of this step, unless it exists; delete those beyond `keep_last`. All ranks call it."""
        if step == self._saved_step:
            return
        trainer.save_checkpoint(self._path(step))
        self._saved_step = step
        if is_rank_zero():
            link_checkpoint(self._folder, "last", self._path(step))
            if self.best_step == step:
                link_checkpoint(self._folder, "best", self._path(step))
            self._folder.append_event(step, "checkpoint", path=str(self._path(step).relative_to(self._folder.path)))
            if self._on_saved is not None:
                self._on_saved(self._path(step))
            for old in list_checkpoints(self._folder)[: -self._keep_last]:
                if step_of(old) != self.best_step:
                    _delete(old)

    @property
    def best_checkpoint(self) -> Path | None:
        """The checkpoint with the lowest val/loss; None before the first validation."""
        return None if self.best_step is None else self._path(self.best_step)

    def _path(self, step: int) -> Path:
        return self._folder.checkpoints / f"step-{step:06d}"
