"""Decide which samples each optimizer step has, and in which micro-batches: pure functions without state.

Step t trains on the samples at positions t * G to (t + 1) * G of the order, where G is `global_batch_size`. Every rank
computes the whole layout from the stored lengths alone. So the ranks need no communication, and a resumed run needs
only the step number.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from qwlit.core.errors import ConfigError
from qwlit.data.order import Order
from qwlit.data.samples import Indices, Samples, longest


@dataclass(frozen=True)
class Limits:
    """Limits of one micro-batch: what one rank runs in one forward pass."""

    max_samples: int | None = None
    """`micro_batch_size`, in samples."""
    max_tokens: int | None = None
    """`micro_batch_tokens`, in tokens, including padding."""

    def check(self, samples: Samples) -> None:
        """Raise ConfigError if one sample alone has more than `max_tokens`."""
        if self.max_tokens is not None and (most := longest(samples)) > self.max_tokens:
            raise ConfigError(
                f"hardware.micro_batch_tokens={self.max_tokens}: the longest sample has {most} tokens;"
                f" raise it to {most}, or lower data.max_seq_len"
            )


@dataclass(frozen=True)
class MicroLayout:
    """One micro-batch: indices into the step's list of samples.

    A filler adds nothing to the loss; it only gives every rank the same number of micro-batches.
    """

    members: tuple[int, ...]
    filler: bool = False


def assign_micro_batches(
    lengths: Sequence[int], world_size: int, limits: Limits, *, packing: bool
) -> list[list[MicroLayout]]:
    """Assign samples to micro-batches, the same number for every rank.

    Args:
        lengths: tokens of each of the step's samples.

    Returns:
        The micro-batches of each rank. A rank with too few samples gets a filler: the shortest sample with zero loss.
    """
    fill = _fill_packed if packing else _fill_padded
    bins = fill(lengths, world_size, limits)
    shortest = min(range(len(lengths)), key=lambda i: (lengths[i], i))
    layouts = [MicroLayout(tuple(sorted(members))) for members in bins]
    # All ranks need the same number: each forward and backward pass has collective operations, which wait for all.
    layouts += [MicroLayout((shortest,), filler=True)] * (-len(layouts) % world_size)
    return [layouts[rank::world_size] for rank in range(world_size)]


def num_steps(epochs: float, num_samples: int, global_batch_size: int) -> int:
    """Return ceil(epochs * N / G), exactly for the decimal number that the user wrote: 1.1 epochs of 10 are 11."""
    return math.ceil(Fraction(str(epochs)) * num_samples / global_batch_size)


def _longest_first(lengths: Sequence[int]) -> list[int]:
    # For equal lengths the index decides, so that all ranks compute the same order.
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def _fill_packed(lengths: Sequence[int], world_size: int, limits: Limits) -> list[list[int]]:
    """Put each sample, longest first, into the micro-batch with the fewest tokens.

    This balances their tokens, and needs nearly the smallest number of micro-batches.
    """
    # A round is one micro-batch on each rank. Start with the fewest rounds that the limits could allow.
    rounds = 1
    if limits.max_samples is not None:
        rounds = max(rounds, -(-len(lengths) // (limits.max_samples * world_size)))
    if limits.max_tokens is not None:
        rounds = max(rounds, -(-sum(lengths) // (limits.max_tokens * world_size)))
    while (bins := _try_packed(lengths, rounds * world_size, limits)) is None:
        rounds += 1
    # Most tokens first: dealing them out to the ranks in turn then gives similar loads, and fillers come last.
    return sorted(filter(None, bins), key=lambda members: (-sum(lengths[i] for i in members), members[0]))


def _try_packed(lengths: Sequence[int], num_bins: int, limits: Limits) -> list[list[int]] | None:
    """Pack into `num_bins` micro-batches; return None if a sample does not fit into the one with the fewest tokens."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    # A heap of (tokens, index): its first entry is the micro-batch with the fewest tokens.
    by_load = [(0, bin_index) for bin_index in range(num_bins)]
    for index in _longest_first(lengths):
        load, bin_index = heapq.heappop(by_load)
        # If the sample does not fit here, it fits nowhere: all other micro-batches have at least as many tokens.
        if limits.max_tokens is not None and load + lengths[index] > limits.max_tokens:
            return None
        bins[bin_index].append(index)
        # A micro-batch with `max_samples` samples does not return to the heap: it is full.
        if limits.max_samples is None or len(bins[bin_index]) < limits.max_samples:
            heapq.heappush(by_load, (load + lengths[index], bin_index))
    return bins


def _fill_padded(lengths: Sequence[int], world_size: int, limits: Limits) -> list[list[int]]:
    """Put samples of similar length into one micro-batch, so that there is little padding."""
    order = _longest_first(lengths)
    max_members = min(limits.max_samples or len(order), -(-len(order) // world_size))
    bins: list[list[int]] = []
    for index in order:
        # Longest first: a micro-batch is as wide as its first member.
        width = lengths[bins[-1][0]] if bins else 0
        full = not bins or len(bins[-1]) >= max_members
        if full or (limits.max_tokens is not None and width * (len(bins[-1]) + 1) > limits.max_tokens):
            bins.append([])
        bins[-1].append(index)
    return bins


@dataclass(frozen=True)
class SkippedData:
    """Samples that no step trains on, because the run went back and passes over them."""

    from_step: int
    """From this step on, all samples come earlier."""
    num_steps: int
    """By so many steps' samples."""


@dataclass(frozen=True)
class StepPlan:
    """The steps of a run over one data set."""

    train: Samples
    order: Order
    global_batch_size: int
    world_size: int
    limits: Limits
    packing: bool
    skipped_data: tuple[SkippedData, ...] = ()

    def samples(self, step: int) -> Indices:
        """Return the sample ids of a step, (G,), in the order of the plan."""
        skipped = sum(skipped.num_steps for skipped in self.skipped_data if step >= skipped.from_step)
        first = (step + skipped) * self.global_batch_size
        return self.order.at(np.arange(first, first + self.global_batch_size))

    def layout(self, samples: Indices) -> list[list[MicroLayout]]:
        """Return the micro-batches of every rank for these samples."""
        return assign_micro_batches(
            self.train.lengths(samples).tolist(), self.world_size, self.limits, packing=self.packing
        )

    def steps_of_epochs(self, epochs: float) -> int:
        """Return the number of steps that finish `epochs` epochs; see `num_steps`."""
        return num_steps(epochs, self.order.epoch_length, self.global_batch_size)

    def next_epoch_end(self, step: int) -> int:
        """Return the first step after `step` at which an epoch ends."""
        epochs = step * self.global_batch_size // self.order.epoch_length
        while (end := self.steps_of_epochs(epochs)) <= step:
            epochs += 1
        return end
