"""The endless order in which training meets samples: a pure function of the seed and the position."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from qwlit.core.errors import ConfigError
from qwlit.data.samples import Indices

BLOCK = 1024


@dataclass(frozen=True)
class Order:
    """Epochs laid end to end, each a fresh shuffle.

    An epoch draws `quotas[p]` samples of part p, which has `sizes[p]`. Each part goes through its samples in its own
    endless order, so that none is seen twice before all are seen once. Samples are numbered through all parts.
    """

    seed: int
    sizes: tuple[int, ...]
    quotas: tuple[int, ...]
    _shuffles: dict[int, tuple[int, NDArray[np.int32]]] = field(default_factory=dict, compare=False, repr=False)
    _turns: dict[int, "_Turns"] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def plain(cls, seed: int, num_samples: int) -> "Order":
        """Every sample once an epoch."""
        return cls(seed, (num_samples,), (num_samples,))

    @classmethod
    def weighted(cls, seed: int, sizes: Sequence[int], weights: Sequence[float]) -> "Order":
        """Draw from each part in proportion to its weight; an epoch has as many samples as there are.

        Raises:
            ConfigError: a weight is so small that its part would never be seen.
        """
        if 0 in sizes:
            raise ConfigError(f"data.path: part {sizes.index(0) + 1} has no sample to draw; leave it out")
        num_samples = sum(sizes)
        exact = [num_samples * weight / sum(weights) for weight in weights]
        quotas = [int(share) for share in exact]
        # What rounding down left over goes to the largest remainders.
        by_remainder = sorted(range(len(sizes)), key=lambda p: (quotas[p] - exact[p], p))
        for part in by_remainder[: num_samples - sum(quotas)]:
            quotas[part] += 1
        if 0 in quotas:
            part = quotas.index(0)
            raise ConfigError(
                f"data.path: weight {weights[part]:g} of part {part + 1} gives it none of an epoch's {num_samples:,}"
                " samples; raise it, or leave the part out"
            )
        return cls(seed, tuple(sizes), tuple(quotas))

    @property
    def epoch_length(self) -> int:
        """Samples an epoch."""
        return sum(self.quotas)

    def at(self, positions: Indices) -> Indices:
        """Return the samples at these positions, counted from 0 and ascending."""
        if len(self.sizes) == 1:
            return self._draw(0, positions)
        epochs, within = np.divmod(positions, self.epoch_length)
        out = np.empty(len(positions), dtype=np.int64)
        starts = [0, *accumulate(self.sizes)]
        for epoch in np.unique(epochs):
            places = np.flatnonzero(epochs == epoch)
            owners, ranks = self._turns_of(int(epoch)).at(within[places])
            for part in np.unique(owners):
                here = owners == part
                out[places[here]] = starts[part] + self._draw(int(part), epoch * self.quotas[part] + ranks[here])
        return out

    def _draw(self, part: int, draws: Indices) -> Indices:
        """Return what the part's own order has at these places, numbered within the part."""
        size = self.sizes[part]
        epochs, within = np.divmod(draws, size)
        out = np.empty(len(draws), dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = self._shuffle(part, int(epoch), size)[within[here]]
        return out

    def _turns_of(self, epoch: int) -> "_Turns":
        """Return whose turn it is at each position of the epoch, and keep it until another is asked for."""
        if epoch not in self._turns:
            turns = np.repeat(np.arange(len(self.quotas), dtype=np.int16), self.quotas)
            np.random.Generator(self._bits(len(self.sizes), epoch)).shuffle(turns)
            self._turns.clear()
            self._turns[epoch] = _Turns(turns, len(self.sizes))
        return self._turns[epoch]

    def _bits(self, stream: int, epoch: int) -> np.random.Philox:
        """Return random bits: Philox is keyed, so epochs need no predecessor; its counter sets streams far apart."""
        return np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64), counter=[0, 0, 0, stream])

    def _shuffle(self, part: int, epoch: int, size: int) -> NDArray[np.int32]:
        """Return one shuffle, (size,), and keep it until the part's next: steps come in order."""
        known = self._shuffles.get(part)
        if known is None or known[0] != epoch:
            shuffled = np.arange(size, dtype=np.int32)
            np.random.Generator(self._bits(part, epoch)).shuffle(shuffled)
            known = self._shuffles[part] = (epoch, shuffled)
        return known[1]


class _Turns:
    """Which part each position of one epoch draws from, and how often the part has been drawn from before."""

    def __init__(self, owners: NDArray[np.int16], num_parts: int) -> None:
        self._owners, self._num_parts = owners, num_parts
        blocks = [owners[start : start + BLOCK] for start in range(0, len(owners), BLOCK)]
        counts = [np.bincount(block, minlength=num_parts) for block in blocks]
        self._before = np.cumsum([np.zeros(num_parts, dtype=np.int64), *counts], axis=0)

    def at(self, positions: Indices) -> tuple[NDArray[np.int16], Indices]:
        """Return owners and ranks at these positions of the epoch, ascending."""
        block, last = int(positions[0]) // BLOCK, int(positions[-1])
        owners = self._owners[block * BLOCK : last + 1]
        ranks = np.empty(len(owners), dtype=np.int64)
        for part in range(self._num_parts):
            here = owners == part
            ranks[here] = self._before[block, part] + np.arange(np.count_nonzero(here))
        chosen = positions - block * BLOCK
        return owners[chosen], ranks[chosen]
