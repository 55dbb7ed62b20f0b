"""Write and read a checkpoint: a folder that is either complete or absent.

A checkpoint is written into a temporary folder on the same file system, synced, and renamed. Its manifest is the last
file written, and every reader compares the files with it first.
"""

import io
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed import ProcessGroup

from qwlit.core.disk import reason_of_disk
from qwlit.core.errors import ConfigError, QwlitError, first_line
from qwlit.core.files import fsync_folder
from qwlit.core.sharding import local, sharded_as
from qwlit.model.weight_files import describe_differences
from qwlit.training.checkpointing.finite import find_nonfinite
from qwlit.training.checkpointing.folder import delete_checkpoint, move_away, temporary_folder
from qwlit.training.checkpointing.manifest import (
    MOMENTS,
    STATE,
    WEIGHTS,
    find_damage,
    forget_hashes,
    num_shards,
    read_manifest,
    shard_file,
    shard_files,
    step_of,
    write_manifest,
)
from qwlit.training.checkpointing.shards import ShardReader, safetensors_pieces, write_file

# The module's parameter names have this prefix before the Hugging Face name; the files have Hugging Face names.
PREFIX = "loss_model.causal_lm."
IDENTITY = "identity"
"""Key of what the manifest says beside the files, see `manifest.write_manifest`."""
REQUIRED = {"global_step", "loops", "callbacks", "optimizer_parameters", "optimizer_groups"}
"""Keys of the state without which Lightning would begin anew without an error."""
SCALES_OF_BLOCKS = "absmax1."
"""What bitsandbytes calls the scales of 8-bit moments, one for each block of a tensor, or of a rank's slice of it."""
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The ranks that write a checkpoint together, each its shard slices, or that read one together."""

    rank: int = 0
    count: int = 1
    group: ProcessGroup | None = None
    """The process group of these ranks; None for the default group, or for one rank."""

    @classmethod
    def all(cls) -> "Ranks":
        """Return all ranks of the training."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    def together(self, action: Callable[[], T]) -> list[T]:
        """Call `action` on every rank and wait for all of them; return the results of all, on every rank.

        Raises:
            Exception: it failed on this rank.
            OSError, QwlitError: it failed on another rank, which the message names. So no rank waits for one that has
                given up.
        """
        if self.count == 1:
            return [action()]
        value, own = None, None
        try:
            value = action()
        except Exception as error:
            own = error
        results: list[Any] = [None] * self.count
        dist.all_gather_object(results, (value, own and self._for_others(own)), group=self.group)
        for _, failure in results:
            if failure is not None:
                raise own or failure
        return [value for value, _ in results]

    def _for_others(self, error: Exception) -> Exception:
        """Return the error that the other ranks raise; not every error can be sent."""
        if isinstance(error, OSError) and error.errno is not None:
            return OSError(error.errno, f"{reason_of_disk(error)} on rank {self.rank}", error.filename)
        failure = QwlitError(f"rank {self.rank} failed: {first_line(error)}")
        failure.exit_code = getattr(error, "exit_code", failure.exit_code)
        return failure


ONE_RANK = Ranks()


def nonfinite_on_any_rank(tensors: Mapping[str, Tensor], ranks: Ranks) -> str | None:
    """Return the name of a tensor with a NaN or an infinity on any of these ranks; None where all are finite."""
    found = ranks.together(lambda: find_nonfinite(tensors))
    return next(filter(None, found), None)


def write_checkpoint(checkpoint: dict[str, Any], final: Path, ranks: Ranks = ONE_RANK) -> None:
    """Write Lightning's checkpoint dictionary as a folder: tensors as safetensors, the rest as a torch file.

    Raises:
        Exception: a rank cannot write; nothing is left of the checkpoint.
    """
    temporary = temporary_folder(final)
    leads = ranks.rank == 0
    weights = {name.removeprefix(PREFIX): t for name, t in checkpoint.pop("state_dict").items()}
    (optimizer,) = checkpoint.pop("optimizer_states")
    names = [name.removeprefix(PREFIX) for name in checkpoint["optimizer_parameters"]]
    state = {f"{key}.{names[i]}": v for i, values in optimizer["state"].items() for key, v in values.items()}
    moments = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    # bitsandbytes counts its steps in Python numbers.
    numbers = {key: value for key, value in state.items() if key not in moments}
    facts = {"step": checkpoint["global_step"], **checkpoint.pop(IDENTITY, {})}
    kept = checkpoint | {"optimizer_groups": optimizer["param_groups"], "optimizer_numbers": numbers}

    def write_own_files() -> dict[str, Any]:
        files = {}
        for stem, tensors in ((WEIGHTS, weights), (MOMENTS, moments)):
            name = shard_file(stem, ranks.rank, ranks.count)
            own = {key: local(tensor) for key, tensor in tensors.items()}
            files[name] = write_file(temporary / name, safetensors_pieces(own))
        if leads:
            content = io.BytesIO()
            torch.save(kept, content)
            files[STATE] = write_file(temporary / STATE, [content.getbuffer()])
        return files

    def create_folder() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        # Not the run folder: if that was renamed, a second one would hold the rest of the run.
        temporary.parent.mkdir(exist_ok=True)
        temporary.mkdir()

    # Rank 0 creates the folder, all ranks write into it, and rank 0 renames it when the last file is on the disk.
    try:
        ranks.together(create_folder if leads else _nothing)
        files = {name: entry for own in ranks.together(write_own_files) for name, entry in own.items()}

        def finish_folder() -> None:
            write_manifest(temporary, facts, files)
            fsync_folder(temporary)
            move_away(final)
            temporary.rename(final)
            try:
                fsync_folder(final.parent)
            except OSError:
                delete_checkpoint(final)
                raise

        ranks.together(finish_folder if leads else _nothing)
    except Exception:
        if leads:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _nothing() -> None:
    """What the other ranks do while rank 0 works."""


def read_weights(checkpoint: Path, expected: Mapping[str, Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Read the trained weights by their Hugging Face names, one at a time.

    Args:
        expected: the weights that the model has; the checkpoint must have the same names and shapes.

    Raises:
        ConfigError: the checkpoint is damaged, or has other weights, or some that are not finite. It raises before the
            first weight.
    """
    _refuse_damaged(checkpoint, find_damage(checkpoint))
    try:
        weights = _open(checkpoint, WEIGHTS)
        shapes = {name: weights.shape(name) for name in weights.names()}
        wanted = shapes if expected is None else {name: list(tensor.shape) for name, tensor in expected.items()}
        if differences := describe_differences(shapes, wanted, unexpected="not in the model"):
            raise ValueError(differences)
        for name in shapes:
            if find_nonfinite({name: weights.read(name)}):
                raise ValueError(f"{name} is not finite")
    except NOT_LOADABLE as error:
        raise not_loadable(checkpoint, error) from None
    with weights:
        for name in shapes:
            yield name, weights.read(name)


def _refuse_damaged(checkpoint: Path, reason: str | None) -> None:
    if reason:
        raise ConfigError(
            f"{checkpoint} is damaged ({reason}); run the same command to resume from the checkpoint before"
        )


def _open(checkpoint: Path, stem: str) -> ShardReader:
    """Open the files of this stem in a checkpoint without damage."""
    count = num_shards(read_manifest(checkpoint))
    return ShardReader(checkpoint / name for name in shard_files(stem, count))


def read_checkpoint(
    folder: Path,
    template: dict[str, Tensor] | None = None,
    ranks: Ranks = ONE_RANK,
    *,
    moments_to_host: bool = False,
) -> dict[str, Any]:
    """Read a checkpoint that any number of ranks wrote.

    Args:
        template: the parameters by name; the tensors get the same sharding. None: read whole tensors.
        ranks: those that read it together; each hashes a part of the files.
        moments_to_host: leave the optimizer's tensors in the host's memory; else they go to the template's device.

    Raises:
        ConfigError: the checkpoint is damaged.
    """
    found = ranks.together(lambda: find_damage(folder, rank=ranks.rank, count=ranks.count))
    _refuse_damaged(folder, next(filter(None, found), None))
    forget_hashes()
    try:
        checkpoint = _read_state(folder / STATE)
        if missing := REQUIRED - checkpoint.keys():
            raise ValueError(f"{STATE} lacks {min(missing)}")
        if checkpoint["global_step"] != step_of(folder):
            raise ValueError(f"{STATE} is of step {checkpoint['global_step']}")
        names = checkpoint["optimizer_parameters"]
        with _open(folder, WEIGHTS) as weights, _open(folder, MOMENTS) as moments:
            like = template or {}
            checkpoint["state_dict"] = {
                PREFIX + name: weights.read_as(name, like.get(PREFIX + name)) for name in weights.names()
            }
            tensors = _read_moments(moments, folder, template, ranks, to_host=moments_to_host)
            if name := find_nonfinite(checkpoint["state_dict"] | tensors):
                raise ValueError(f"{name} is not finite")
            indices = {name.removeprefix(PREFIX): index for index, name in enumerate(names)}
            state: dict[int, dict[str, Any]] = {}
            for key, value in (tensors | checkpoint.pop("optimizer_numbers", {})).items():
                kind, _, name = key.partition(".")
                state.setdefault(indices[name], {})[kind] = value
        checkpoint[IDENTITY] = read_manifest(folder)
        checkpoint["optimizer_states"] = [{"state": state, "param_groups": checkpoint.pop("optimizer_groups")}]
    except ConfigError:
        raise  # it says what to do
    except NOT_LOADABLE as error:
        raise not_loadable(folder, error) from None
    return checkpoint


def _read_moments(
    moments: ShardReader, folder: Path, template: dict[str, Tensor] | None, ranks: Ranks, *, to_host: bool
) -> dict[str, Tensor]:
    """Read the optimizer's tensors, see `read_checkpoint`.

    Raises:
        ConfigError: they are in blocks of the shard slices of another number of ranks.
    """
    written = num_shards(read_manifest(folder))
    has_blocks = any(key.startswith(SCALES_OF_BLOCKS) for key in moments.names())
    if has_blocks and written != (1 if template is None else ranks.count):
        devices = f"fsdp on {written} devices" if written > 1 else "one device, or with ddp"
        raise ConfigError(
            f"{folder} has 8-bit moments, whose scales are for blocks of a device's rows; resume on {devices}"
        )

    def read(key: str) -> Tensor:
        kind, _, name = key.partition(".")
        # AdamW's step count is a scalar, so it is not sharded.
        if template is None or kind == "step":
            return moments.read(key)
        parameter = template[PREFIX + name]
        if not has_blocks:
            return moments.read_as(key, parameter, to_host=to_host)
        own = moments.read_of_rank(key, ranks.rank)
        return sharded_as(parameter, own.to(parameter.device)) if own.shape == local(parameter).shape else own

    return {key: read(key) for key in moments.names()}


def _read_state(file: Path) -> dict[str, Any]:
    with warnings.catch_warnings():
        # torch warns about other pickle protocols, beside the error.
        warnings.simplefilter("ignore")
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return state


NOT_LOADABLE = (
    EOFError,
    RuntimeError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    UnpicklingError,
    SafetensorError,
)
"""Errors of the libraries at a checkpoint whose files are as they were written, but with other content than ours."""


def not_loadable(checkpoint: Path, error: BaseException) -> ConfigError:
    """Return the error for a checkpoint that cannot be loaded into this model."""
    return ConfigError(
        f"{checkpoint} cannot be loaded ({first_line(error)}); move it away to resume from the checkpoint before"
    )
