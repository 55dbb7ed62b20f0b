"""What `inspect` shows of tokenized data: supervised tokens and lengths of samples."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np

from qwlit.data.samples import Samples, chunks

SHORTEST_BIN = 16


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of one kind: one control token, or text that is all supervised or all not."""

    start: int
    """Position of the first token."""
    ids: tuple[int, ...]
    kind: Literal["text", "control"]
    supervised: bool


def spans(input_ids: Iterable[int], loss_mask: Iterable[int], control_ids: Collection[int]) -> Iterator[Span]:
    """Divide a sample where supervised tokens begin or end, and around each control token."""
    tokens = list(enumerate(zip(map(int, input_ids), map(bool, loss_mask), strict=True)))
    # The position in the key puts each control token into a group of its own.
    for (supervised, control), group in groupby(
        tokens, key=lambda t: (t[1][1], t[0] if t[1][0] in control_ids else None)
    ):
        members = list(group)
        ids = tuple(token for _, (token, _) in members)
        yield Span(members[0][0], ids, "text" if control is None else "control", supervised)


def length_histogram(samples: Samples) -> list[tuple[int, int, int]]:
    """Return bins (shortest, longest, number of samples) of doubling lengths in tokens; none is empty at the ends."""
    # counts[e] is the number of samples of 2^(e-1) + 1 to 2^e tokens; a length is an int32, so e is below 32.
    counts = np.zeros(32, dtype=np.int64)
    for ids in chunks(samples):
        exponents = np.ceil(np.log2(np.maximum(samples.lengths(ids), SHORTEST_BIN))).astype(int)
        counts += np.bincount(exponents, minlength=len(counts))
    first = int(np.log2(SHORTEST_BIN))
    used = np.flatnonzero(counts).tolist()
    return [
        (1 if exponent == first else 2 ** (exponent - 1) + 1, 2**exponent, int(counts[exponent]))
        for exponent in range(used[0], used[-1] + 1)
    ]
