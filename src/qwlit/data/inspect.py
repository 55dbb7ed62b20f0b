"""What `inspect` shows of tokenized data: supervised tokens and lengths of samples."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np

from qwlit.data.samples import Samples, chunks

SHORTEST_BIN = 16


@dataclass(frozen=True)
class Stretch:
    """Consecutive tokens of one kind: one control token, or text that is all supervised or all not."""

    start: int
    """Position of the first token."""
    ids: tuple[int, ...]
    kind: Literal["text", "control"]
    supervised: bool


def stretches(input_ids: Iterable[int], loss_mask: Iterable[int], control_ids: Collection[int]) -> Iterator[Stretch]:
    """Divide a sample where supervised tokens begin or end, and around each control token."""
    tokens = list(enumerate(zip(map(int, input_ids), map(bool, loss_mask), strict=True)))
    # The position in the key puts each control token into a group of its own.
    for (supervised, control), group in groupby(
        tokens, key=lambda t: (t[1][1], t[0] if t[1][0] in control_ids else None)
    ):
        members = list(group)
        ids = tuple(token for _, (token, _) in members)
        yield Stretch(members[0][0], ids, "text" if control is None else "control", supervised)


def length_histogram(samples: Samples) -> list[tuple[int, int, int]]:
    """Return bins (shortest, longest, number of samples) of doubling lengths in tokens; none is empty at the ends."""
    counts: Counter[int] = Counter()
    for ids in chunks(samples):
        exponents = np.ceil(np.log2(np.maximum(samples.lengths(ids), SHORTEST_BIN))).astype(int)
        counts.update(dict(zip(*(column.tolist() for column in np.unique(exponents, return_counts=True)), strict=True)))
    first = int(np.log2(SHORTEST_BIN))
    return [
        (1 if exponent == first else 2 ** (exponent - 1) + 1, 2**exponent, counts[exponent])
        for exponent in range(min(counts), max(counts) + 1)
    ]
