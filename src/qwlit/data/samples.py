"""Access to samples by id: a subset of a store, or several stores one after the other, without copying any tokens."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Ids = NDArray[np.integer[Any]] | list[int]
CHUNK = 2**20


class Samples(Protocol):
    """Tokenized samples, numbered from 0."""

    def __len__(self) -> int: ...

    def lengths(self, ids: Ids) -> NDArray[np.int32]:
        """Return the number of tokens of each sample."""

    def num_supervised(self, ids: Ids) -> NDArray[np.int32]:
        """Return the number of supervised tokens of each sample."""

    def read(self, ids: Ids) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Return the tokens and the loss mask of these samples end to end, (sum of T,) each."""

    def origin(self, index: int) -> str:
        """Return "file:line" of the row that the sample comes from."""


def chunks(samples: Samples) -> Iterator[Indices]:
    """Yield all ids in order, at most CHUNK at a time, to limit memory."""
    for start in range(0, len(samples), CHUNK):
        yield np.arange(start, min(start + CHUNK, len(samples)))


def longest(samples: Samples) -> int:
    return max(int(samples.lengths(ids).max()) for ids in chunks(samples))


def count_tokens(samples: Samples) -> tuple[int, int]:
    """Return the number of all tokens and of all supervised tokens."""
    counts = [(samples.lengths(ids).sum(), samples.num_supervised(ids).sum()) for ids in chunks(samples)]
    return int(sum(tokens for tokens, _ in counts)), int(sum(supervised for _, supervised in counts))


PERCENTS = tuple(range(0, 101, 5))


def sample_statistics(samples: Samples) -> dict[str, Any]:
    """Return the number of samples, and of their tokens and supervised tokens the sum and the percentiles PERCENTS."""
    counts = [(samples.lengths(ids), samples.num_supervised(ids)) for ids in chunks(samples)]
    found: dict[str, Any] = {"number": len(samples)}
    for name, parts in zip(("tokens", "supervised_tokens"), zip(*counts, strict=True), strict=True):
        values = np.concatenate(parts)
        percentiles = np.percentile(values, PERCENTS, method="nearest").tolist()
        found[name] = {"sum": int(values.sum()), "percentiles": percentiles}
    return found


# 1000 samples almost certainly contain a kind of row that is 1 % of the data, and reading them takes little time.
NUM_PROBED = 1000


def supervises(samples: Samples, token: int) -> bool:
    """Return whether the token is supervised in any of about NUM_PROBED samples, evenly spaced from the first."""
    for index in range(0, len(samples), max(1, len(samples) // NUM_PROBED)):
        ids, mask = samples.read([index])
        if bool(((ids == token) & (mask == 1)).any()):
            return True
    return False


class SampleSubset:
    """Some of the samples, in the order of `indices`."""

    def __init__(self, samples: Samples, indices: NDArray[np.int32]) -> None:
        self._samples, self._indices = samples, indices

    def __len__(self) -> int:
        return len(self._indices)

    def lengths(self, ids: Ids) -> NDArray[np.int32]:
        return self._samples.lengths(self._indices[ids])

    def num_supervised(self, ids: Ids) -> NDArray[np.int32]:
        return self._samples.num_supervised(self._indices[ids])

    def read(self, ids: Ids) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        return self._samples.read(self._indices[ids])

    def origin(self, index: int) -> str:
        return self._samples.origin(int(self._indices[index]))


class ConcatSamples:
    """Several parts one after the other; the ids count through all parts."""

    def __init__(self, parts: Sequence[Samples]) -> None:
        self._parts = tuple(parts)
        self._starts = [0, *accumulate(len(part) for part in parts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def lengths(self, ids: Ids) -> NDArray[np.int32]:
        return self._gather("lengths", ids)

    def num_supervised(self, ids: Ids) -> NDArray[np.int32]:
        return self._gather("num_supervised", ids)

    def _gather(self, column: str, ids: Ids) -> NDArray[np.int32]:
        out = np.empty(len(ids), dtype=np.int32)
        for part, places, inner in self._by_part(ids):
            out[places] = getattr(part, column)(inner)
        return out

    def read(self, ids: Ids) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        pieces: list[Any] = [None] * len(ids)
        for part, places, inner in self._by_part(ids):
            tokens, mask = part.read(inner)
            ends = np.cumsum(part.lengths(inner))[:-1]
            for place, *piece in zip(places.tolist(), np.split(tokens, ends), np.split(mask, ends), strict=True):
                pieces[place] = piece
        tokens_of, mask_of = zip(*pieces, strict=True)
        return np.concatenate(tokens_of), np.concatenate(mask_of)

    def _by_part(self, ids: Ids) -> Iterator[tuple[Samples, Indices, NDArray[np.integer[Any]]]]:
        """Yield each part that has some of the ids, with their places among `ids` and their numbers in the part."""
        ids = np.asarray(ids)
        owner = np.searchsorted(self._starts, ids, side="right") - 1
        for part in np.unique(owner):
            places = np.flatnonzero(owner == part)
            yield self._parts[part], places, ids[places] - self._starts[part]

    def origin(self, index: int) -> str:
        part, inner = self._locate(index)
        return part.origin(inner)

    def _locate(self, index: int) -> tuple[Samples, int]:
        part = bisect_right(self._starts, index) - 1
        return self._parts[part], index - self._starts[part]


def concat(parts: Sequence[Samples]) -> Samples:
    return parts[0] if len(parts) == 1 else ConcatSamples(parts)
