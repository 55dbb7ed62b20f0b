"""How far the first tensors in which two replays differ are apart, and where most."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Size:
    """How far two tensors differ, and where most."""

    largest: float
    """The largest absolute difference."""
    relative: float
    """That, as a share of the largest absolute value of the first run's tensor."""
    elements: int
    """How many elements differ."""
    of: int
    index: tuple[int, ...]
    """Of the largest difference."""
    values: tuple[float, float]
    sample: str | None
    """FILE:LINE of the sample that this element belongs to."""
    token: int | None
    """The position in this sample, counted from 0."""


def compare_kept(files: Sequence[Path]) -> Size | str:
    """Compare the tensors that two replays kept; return a text where they cannot be compared."""
    if not files[0].exists():
        return "the first run's replay does not repeat itself"
    kept = [torch.load(file, weights_only=True, map_location="cpu") for file in files]
    first, second = (each["tensor"] for each in kept)
    if kept[0]["key"] != kept[1]["key"]:
        return "the replays compute in another order"
    if first.shape != second.shape:
        return f"shape {(*first.shape,)} against {(*second.shape,)}"
    a, b = first.double(), second.double()
    differences = (a - b).abs().nan_to_num(nan=float("inf"))
    # NaN on both sides, or 0 against -0: only the bits differ.
    differences[a.isnan() & b.isnan()] = 0
    index = tuple(int(i) for i in torch.unravel_index(differences.argmax(), first.shape))
    largest = float(differences[index])
    return Size(
        largest,
        largest / (float(a.abs().max()) or 1.0),
        int((differences > 0).sum()),
        first.numel(),
        index,
        (float(a[index]), float(b[index])),
        *sample_at(kept[0], first.shape, index),
    )


def sample_at(kept: dict[str, Any], shape: torch.Size, index: tuple[int, ...]) -> tuple[str | None, int | None]:
    """Return the sample of an element of a (B, T, …) or (N, …) tensor, and the position in that sample.

    Args:
        kept: `shape`: (B, T); `labels`: (N,) label positions; `lengths` of packed documents, or None; `samples`.
    """
    if "shape" not in kept or not index:
        return None, None
    rows, width = kept["shape"]
    if [*shape[:2]] == [rows, width]:
        row, position = index[0], index[1]
    elif shape[0] == len(kept["labels"]):
        row, position = divmod(int(kept["labels"][index[0]]), width)
    else:
        return None, None
    for sample, length in enumerate(kept["lengths"] or ()):
        if position < length:
            return kept["samples"][sample], position
        position -= length
    return kept["samples"][row], position
