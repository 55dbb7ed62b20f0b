"""The infinite order in which training uses the samples: a pure function of seed and position."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from qwlit.core.errors import ConfigError
from qwlit.data.samples import Indices

# Positions per block of counts; see `_PartSequence`.
BLOCK = 1024


@dataclass(frozen=True)
class Order:
    """Epochs one after the other, each with a new shuffle.

    An epoch draws `quotas[p]` samples from part p, which has `sizes[p]` samples. Each part has its own infinite order,
    so no sample is used twice before all samples of its part are used once. Ids run through all parts.
    """

    seed: int
    sizes: tuple[int, ...]
    quotas: tuple[int, ...]
    _shuffles: dict[int, tuple[int, NDArray[np.int32]]] = field(default_factory=dict, compare=False, repr=False)
    _sequences: dict[int, "_PartSequence"] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def plain(cls, seed: int, num_samples: int) -> "Order":
        """Draw every sample once per epoch."""
        return cls(seed, (num_samples,), (num_samples,))

    @classmethod
    def weighted(cls, seed: int, sizes: Sequence[int], weights: Sequence[float]) -> "Order":
        """Draw from each part in proportion to its weight; an epoch has as many samples as there are.

        Raises:
            ConfigError: a weight is so small that an epoch has no sample of its part, or a part has no samples.
        """
        if 0 in sizes:
            raise ConfigError(f"data.path: part {sizes.index(0) + 1} has no sample to draw; remove it")
        num_samples = sum(sizes)
        exact = [num_samples * weight / sum(weights) for weight in weights]
        quotas = [int(share) for share in exact]
        # Rounding down leaves some samples over: give one each to the parts with the largest remainders.
        by_remainder = sorted(range(len(sizes)), key=lambda p: (quotas[p] - exact[p], p))
        for part in by_remainder[: num_samples - sum(quotas)]:
            quotas[part] += 1
        if 0 in quotas:
            part = quotas.index(0)
            raise ConfigError(
                f"data.path: weight {weights[part]:g} of part {part + 1} gives it none of an epoch's {num_samples:,}"
                " samples; raise it, or remove the part"
            )
        return cls(seed, tuple(sizes), tuple(quotas))

    @property
    def epoch_length(self) -> int:
        """Samples per epoch."""
        return sum(self.quotas)

    def at(self, positions: Indices) -> Indices:
        """Return the sample ids at these positions, which count from 0 and ascend."""
        # With one part, its own order is the whole order.
        if len(self.sizes) == 1:
            return self._draw(0, positions)
        epochs, within = np.divmod(positions, self.epoch_length)
        out = np.empty(len(positions), dtype=np.int64)
        starts = [0, *accumulate(self.sizes)]
        for epoch in np.unique(epochs):
            in_epoch = np.flatnonzero(epochs == epoch)
            parts, draws = self._part_sequence(int(epoch)).at(within[in_epoch])
            for part in np.unique(parts):
                of_part = parts == part
                # In earlier epochs the part has drawn epoch * quota samples; its own order continues from there.
                out[in_epoch[of_part]] = starts[part] + self._draw(
                    int(part), epoch * self.quotas[part] + draws[of_part]
                )
        return out

    def _draw(self, part: int, draws: Indices) -> Indices:
        """Return the samples at these positions of the part's own order, numbered within the part."""
        size = self.sizes[part]
        epochs, within = np.divmod(draws, size)
        out = np.empty(len(draws), dtype=np.int64)
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            out[in_epoch] = self._shuffle(part, int(epoch), size)[within[in_epoch]]
        return out

    def _part_sequence(self, epoch: int) -> "_PartSequence":
        """Return which part each position of the epoch draws from. Cache it until another epoch is needed."""
        if epoch not in self._sequences:
            parts = np.repeat(np.arange(len(self.quotas), dtype=np.int16), self.quotas)
            np.random.Generator(self._random_bits(len(self.sizes), epoch)).shuffle(parts)
            # Steps come in order, so only one epoch is needed at a time.
            self._sequences.clear()
            self._sequences[epoch] = _PartSequence(parts, len(self.sizes))
        return self._sequences[epoch]

    def _random_bits(self, stream: int, epoch: int) -> np.random.Philox:
        """Return a random generator for one stream (a part, or the sequence of parts) in one epoch.

        Philox takes a key, so epoch 7 needs no draws of epochs 0 to 6: a resumed run starts at any position. Different
        counters keep the streams independent.
        """
        return np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64), counter=[0, 0, 0, stream])

    def _shuffle(self, part: int, epoch: int, size: int) -> NDArray[np.int32]:
        """Return one shuffle, (size,). Cache only the last one of each part, because steps come in order."""
        known = self._shuffles.get(part)
        if known is None or known[0] != epoch:
            shuffled = np.arange(size, dtype=np.int32)
            np.random.Generator(self._random_bits(part, epoch)).shuffle(shuffled)
            known = self._shuffles[part] = (epoch, shuffled)
        return known[1]


class _PartSequence:
    """For each position of one epoch: its part, and how many draws from this part come before it.

    Counting these draws from the start would need the whole epoch at each step. So we store the counts at the start of
    each block, and count only from there.
    """

    def __init__(self, parts: NDArray[np.int16], num_parts: int) -> None:
        self._parts, self._num_parts = parts, num_parts
        blocks = [parts[start : start + BLOCK] for start in range(0, len(parts), BLOCK)]
        counts = [np.bincount(block, minlength=num_parts) for block in blocks]
        self._draws_before_block = np.cumsum([np.zeros(num_parts, dtype=np.int64), *counts], axis=0)

    def at(self, positions: Indices) -> tuple[NDArray[np.int16], Indices]:
        """Return the parts at these ascending positions, and for each the number of earlier draws from its part."""
        block, last = int(positions[0]) // BLOCK, int(positions[-1])
        parts = self._parts[block * BLOCK : last + 1]
        draws = np.empty(len(parts), dtype=np.int64)
        for part in range(self._num_parts):
            of_part = parts == part
            draws[of_part] = self._draws_before_block[block, part] + np.arange(np.count_nonzero(of_part))
        chosen = positions - block * BLOCK
        return parts[chosen], draws[chosen]
