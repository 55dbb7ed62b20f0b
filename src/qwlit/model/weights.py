"""Fill a model with weights, from safetensors or random. In a sharded model each rank fills its shard slices."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qwlit.core.errors import ConfigError
from qwlit.core.sharding import copy_own_slice, local, own_slice_range
from qwlit.model.families.decoder import EMBEDDING, HEAD
from qwlit.model.weight_files import Files, describe_differences, read_shapes, read_tensors, weight_files

OnWeightWritten = Callable[[str], None]


def fill_weights(
    model: nn.Module, folder: Path, *, tied: bool, on_weight_written: OnWeightWritten | None = None
) -> None:
    """Copy the folder's tensors into the model's, one at a time, converted to the dtype of the model's tensor.

    Args:
        model: whole, or with this rank's shard slices; with or without adapters.
        tied: head and embedding are one weight.
        on_weight_written: called with the name of each weight after it is written.

    Raises:
        ConfigError: tensors are missing, unexpected, of another shape, or hold inf or NaN.
    """
    files = weight_files(folder)
    targets = _targets(model)
    if tied:
        targets[HEAD] = targets[EMBEDDING]
    _check_shapes(folder, read_shapes(files), {name: list(p.shape) for name, p in targets.items()}, tied=tied)
    embedding = targets[EMBEDDING]
    with torch.no_grad():
        for name, tensor in read_tensors(files):
            # Drop this reference: the quantized weight replaces this one, and both must not stay in memory.
            target = targets.pop(name)
            first, end = own_slice_range(target)
            rows = tensor[first:end]
            _check_finite(folder, name, rows)
            if tied and name == HEAD:
                continue
            local(target).copy_(rows)
            if on_weight_written:
                on_weight_written(name)
        if tied:
            _check_tied(folder, files, embedding)


def draw_weights(model: nn.Module, *, seed: int, std: float, on_weight_written: OnWeightWritten | None = None) -> None:
    """Fill the model with random weights, as transformers initialises it: matrices normal, biases 0, norms 1.

    Each tensor has its own generator, seeded with `seed` and the tensor's name, so the weights do not depend on the
    machine or the number of ranks. Only one unsharded tensor at a time is in memory.

    Args:
        std: standard deviation of the matrices.
        on_weight_written: called with the name of each weight after it is written.
    """
    targets = _targets(model)
    with torch.no_grad():
        for name in list(targets):
            parameter = targets.pop(name)
            copy_own_slice(parameter, drawn(name, parameter.shape, seed, std))
            if on_weight_written:
                on_weight_written(name)


def drawn(name: str, shape: Sequence[int], seed: int, std: float) -> Tensor:
    """Return a weight of `draw_weights`."""
    if len(shape) == 1:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0)
    word = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(word[:8], "little"))
    return torch.empty(shape).normal_(std=std, generator=generator)


def _targets(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the model's parameters without adapters, by their names in files; a tied weight occurs once."""
    # With an adapter on layer X, peft renames X.weight to X.base_layer.weight.
    return {name.replace(".base_layer.", "."): p for name, p in model.named_parameters() if "lora_" not in name}


def _check_shapes(folder: Path, found: dict[str, list[int]], expected: dict[str, list[int]], *, tied: bool) -> None:
    if tied and HEAD not in found:
        expected = {name: shape for name, shape in expected.items() if name != HEAD}
    if differences := describe_differences(found, expected, unexpected="unexpected"):
        raise ConfigError(f"{folder}: config.json and weights disagree. Tensors {differences}")


def _check_finite(folder: Path, name: str, rows: Tensor) -> None:
    # The sum is not finite if a value is inf or NaN, and it needs no mask in memory. Large finite values can overflow
    # it too, so check each value then.
    if not rows.sum(dtype=torch.float32).isfinite() and not rows.isfinite().all():
        raise ConfigError(f"{folder}: {name} holds inf or NaN; these model files are damaged; download them again")


def _check_tied(folder: Path, files: Files, embedding: Tensor) -> None:
    """Refuse a folder whose config.json says that head and embedding are one weight, but whose files have two."""
    head: Any = next((tensor for name, tensor in read_tensors(files) if name == HEAD), None)
    if head is None:
        return
    first, end = own_slice_range(embedding)
    rows = local(embedding)
    if not torch.equal(head[first:end].to(rows.dtype).to(rows.device), rows):
        raise ConfigError(
            f"{folder / 'config.json'}: tie_word_embeddings=true, but the weights have their own head; set it false"
        )
