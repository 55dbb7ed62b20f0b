"""The batches that `data` builds and `model` and `training` read.

Shapes: B sequences of T positions (packed: B = 1 and T = the sum of the documents' lengths), N supervised tokens.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from numpy import ndarray
from torch import Tensor


class _TensorDataclass:
    """Gives a dataclass of tensors the methods `to` and `pin_memory`, which Lightning and the DataLoader call.

    A DataLoader's worker sends it through a pipe: torch would put each tensor into a file of its own in /dev/shm, which
    is small in containers, and a worker that finds it full leaves the run waiting.
    """

    def __getstate__(self) -> dict[str, Any]:
        return {name: v.numpy() if isinstance(v, Tensor) else v for name, v in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({k: torch.from_numpy(v) if isinstance(v, ndarray) else v for k, v in state.items()})

    def _map(self, convert: Any) -> Self:
        moved = {f.name: convert(getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]
        return replace(self, **moved)  # type: ignore[type-var]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Self:
        return self._map(lambda value: _convert(value, "to", device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        return self._map(lambda value: _convert(value, "pin_memory"))


def _convert(value: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    if isinstance(value, Tensor | _TensorDataclass):
        return getattr(value, method)(*args, **kwargs)
    if isinstance(value, tuple):
        return tuple(_convert(item, method, *args, **kwargs) for item in value)
    return value


@dataclass(frozen=True)
class MicroBatch(_TensorDataclass):
    """One forward and backward: packed documents (B = 1, with `cu_seqlens`) or right-padded sequences (without)."""

    input_ids: Tensor
    """(B, T) int64."""
    position_ids: Tensor
    """(B, T) int64, counted from 0 within each document."""
    label_positions: Tensor
    """(N,) int64: positions in the flattened B * T whose next token is supervised."""
    targets: Tensor
    """(N,) int64: the supervised token after each label position."""
    cu_seqlens: Tensor | None
    """(documents + 1,) int32 cumulative document lengths when packed; None when padded."""
    document_lengths: tuple[int, ...] | None
    """The packed documents' lengths as Python numbers: reading them does not wait for the GPU. None when padded."""
    sample_lengths: Tensor
    """(samples,) int64: the tokens of each sample, without padding."""
    sample_ids: tuple[int, ...]

    @property
    def max_seqlen(self) -> int:
        """Length of the longest document (packed) or of the padded sequences."""
        return max(self.document_lengths) if self.document_lengths else int(self.input_ids.shape[1])


@dataclass(frozen=True)
class StepBatch(_TensorDataclass):
    """One rank's micro-batches of one optimizer step. The counts are those of all ranks together."""

    step: int
    """Counted from 0."""
    micro_batches: tuple[MicroBatch, ...]
    num_supervised_tokens: int
    num_tokens: int
    """Non-padding tokens, all ranks."""
    num_token_pairs: float
    """Pairs of a query and a key in causal attention: the sum of half the square of each sample's length, all ranks."""
    sample_ids: tuple[int, ...]
    """The step's samples on all ranks, in the order of the step plan."""
