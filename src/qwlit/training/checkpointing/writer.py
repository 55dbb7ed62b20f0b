"""Write checkpoints in a thread, from a copy in host memory, while the training goes on."""

from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import CheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from qwlit.core.sharding import local
from qwlit.training.checkpointing.checkpoint import ONE_RANK, Ranks, read_checkpoint, write_checkpoint
from qwlit.training.checkpointing.folder import delete_checkpoint


class CheckpointWriter(CheckpointIO):
    """Writes one checkpoint at a time. Lightning's strategies call it as their checkpoint plugin."""

    def __init__(self, *, copy: bool = True) -> None:
        """Create the writer.

        Args:
            copy: copy a checkpoint to host memory and write it from there in a thread; else write it at once.
        """
        self._copies = copy
        self._thread: Thread | None = None
        self._failure: Exception | None = None
        self.ranks = ONE_RANK
        """The ranks that agree about a save."""
        self._writes_shards = False
        self._buffers: list[Tensor] = []
        """The memory of the last copy: touching new pages takes as long as copying."""

    def join_ranks(self, trainer: Trainer, *, write_shards: bool) -> None:
        """Create the group in which the ranks agree about a save. A collective: all ranks call it.

        Args:
            write_shards: whether each rank writes its shard slices; else rank 0 writes everything.
        """
        self._writes_shards = write_shards
        if trainer.world_size > 1:
            # A gloo group of its own: its collectives run on the host and cannot mix with those of the gradients.
            self.ranks = Ranks(trainer.global_rank, trainer.world_size, dist.new_group(backend="gloo"))

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Begin to write the checkpoint; it holds the values of now, whatever the training changes meanwhile."""
        self.join()
        if not self._copies:
            self._write(checkpoint, Path(path))
            return
        copied = self._copy_to_host(checkpoint)
        self._thread = Thread(target=self._write, args=(copied, Path(path)), name="checkpoint writer", daemon=True)
        self._thread.start()

    def _copy_to_host(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Copy every tensor, or this rank's shard slice of it, into memory that the saves share."""
        buffers, self._buffers = iter(self._buffers), []

        def copy(tensor: Tensor) -> Tensor:
            own = local(tensor.detach())
            buffer = next(buffers, None)
            if buffer is None or (buffer.shape, buffer.dtype) != (own.shape, own.dtype):
                buffer = torch.empty(own.shape, dtype=own.dtype, pin_memory=own.is_cuda)
            self._buffers.append(buffer)
            return buffer.copy_(own, non_blocking=True)

        copied: dict[str, Any] = apply_to_collection(checkpoint, Tensor, copy)
        if torch.cuda.is_available():
            # The copies above run on the device's stream; the next step would change what they read.
            torch.cuda.synchronize()
        return copied

    def _write(self, checkpoint: dict[str, Any], path: Path) -> None:
        try:
            write_checkpoint(checkpoint, path, self.ranks if self._writes_shards else ONE_RANK)
        except Exception as error:
            self._failure = error

    def join(self) -> None:
        """Wait until this rank has written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @property
    def is_writing(self) -> bool:
        """Whether this rank still writes."""
        return self._thread is not None and self._thread.is_alive()

    def finish(self) -> OSError | None:
        """Wait for the save that was begun; return why the disk failed, on all ranks alike. A collective.

        Raises:
            Exception: something else failed, see `Ranks.together`.
        """
        self.join()
        failure, self._failure = self._failure, None

        def raise_failure() -> None:
            if failure is not None:
                raise failure

        try:
            self.ranks.together(raise_failure)
        except OSError as error:
            return error
        return None

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(Path(path), ranks=Ranks.all())

    def remove_checkpoint(self, path: Any) -> None:
        delete_checkpoint(Path(path))
