"""Collate planned samples into tensors, and build the loaders that the trainer iterates over.

Shapes: B sequences of T positions (packed: B = 1), N supervised targets.
"""

import atexit
import multiprocessing
import multiprocessing.util
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from qwlit.core.batch import MicroBatch, StepBatch
from qwlit.core.errors import DataError
from qwlit.core.ranks import die_with_parent
from qwlit.core.signals import ignore_signals
from qwlit.data.samples import Samples
from qwlit.data.step_plan import Limits, MicroLayout, StepPlan, assign_micro_batches


def collate(samples: Samples, sample_ids: list[int], *, packing: bool, pad_id: int, filler: bool) -> MicroBatch:
    """Pack samples end to end, or pad each on the right.

    A filler has no targets: it costs a small forward pass and adds exactly 0 to the loss.
    """
    tokens, mask = samples.read(sample_ids)
    lengths = samples.lengths(sample_ids)
    ends = np.cumsum(lengths)
    # Positions restart at 0 in each sample, as if it were alone.
    positions = np.arange(len(tokens)) - np.repeat(ends - lengths, lengths)
    shape = (1, len(tokens)) if packing else (len(lengths), int(lengths.max()))
    # Packed samples follow each other; padded ones begin at every `shape[1]`-th of the B * T positions.
    padding = 0 if packing else np.repeat(np.arange(len(lengths)) * shape[1] - (ends - lengths), lengths)
    places = np.arange(len(tokens)) + padding
    input_ids, position_ids = np.full(shape, pad_id), np.zeros(shape, dtype=np.int64)
    input_ids.put(places, tokens)
    position_ids.put(places, positions)
    # Position p predicts token p + 1, so a label position is one before its target. A sample's first mask is always 0.
    supervised = np.flatnonzero(mask)
    none = np.zeros(0, dtype=np.int64)
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        label_positions=torch.from_numpy(none if filler else places[supervised] - 1),
        targets=torch.from_numpy(none if filler else tokens[supervised].astype(np.int64)),
        # Attention uses these boundaries, so that a packed sample attends only to itself.
        cu_seqlens=torch.tensor([0, *ends.tolist()], dtype=torch.int32) if packing else None,
        document_lengths=tuple(lengths.tolist()) if packing else None,
        sample_lengths=torch.from_numpy(lengths.astype(np.int64)),
        sample_ids=tuple(sample_ids),
    )


@dataclass
class StepDataset(Dataset[StepBatch]):
    """One item per step: the share of one rank in that optimizer step."""

    samples: Samples
    plan: StepPlan
    rank: int
    pad_id: int

    def __getitem__(self, step: int) -> StepBatch:
        """Return the batch of the step.

        Raises:
            DataError: the tokenized data are damaged. A worker returns it: of what it raises, torch makes a traceback.
        """
        try:
            return self._step_batch(step)
        except DataError as error:
            if get_worker_info() is None:
                raise
            return error  # type: ignore[return-value] # `_StepLoader` raises it

    def _step_batch(self, step: int) -> StepBatch:
        ids = self.plan.samples(step)
        lengths = self.samples.lengths(ids).astype(np.int64)
        return StepBatch(
            step=step,
            micro_batches=tuple(self._collate(ids, micro) for micro in self.plan.layout(ids)[self.rank]),
            num_supervised_tokens=int(self.samples.num_supervised(ids).sum()),
            num_tokens=int(lengths.sum()),
            # Causal attention computes about T * T / 2 pairs for a sample of T tokens.
            num_token_pairs=float((lengths**2).sum()) / 2,
            sample_ids=tuple(ids.tolist()),
        )

    def _collate(self, ids: NDArray[np.int64], micro: MicroLayout) -> MicroBatch:
        members = ids[list(micro.members)].tolist()
        return collate(self.samples, members, packing=self.plan.packing, pad_id=self.pad_id, filler=micro.filler)


@dataclass
class _StepSampler(Sampler[int]):
    """Steps `start` to `total`. Its length is `total`, because Lightning counts from step 0 after a resume too."""

    start: int
    total: int

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.total))

    def __len__(self) -> int:
        return self.total


class _StepLoader(DataLoader[StepBatch]):
    """Raises the errors that workers return."""

    def __iter__(self) -> Any:
        return map(_raise_error, super().__iter__())


def _raise_error(item: StepBatch | DataError) -> StepBatch:
    if isinstance(item, DataError):
        raise item
    return item


def train_loader(
    dataset: StepDataset, *, start_step: int, total_steps: int, num_workers: int, pin_memory: bool
) -> DataLoader[StepBatch]:
    """Load one item per step, from `start_step` to the end of the run."""
    if num_workers:
        _kill_workers_at_exit()
    return _StepLoader(
        dataset,
        # An item is already a batch.
        batch_size=None,
        sampler=_StepSampler(start_step, total_steps),
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        worker_init_fn=_init_worker if num_workers else None,
    )


@cache
def _kill_workers_at_exit() -> None:
    """Let this process end although its workers ignore signals.

    Where a run is interrupted, the error may keep the loader's iterator, so that it does not end its workers. Python
    then sends them SIGTERM when the process ends, and waits for them forever.
    """

    def kill() -> None:
        # torch's handler would raise an error for each killed worker.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for child in multiprocessing.active_children():
            if child.daemon:
                child.kill()

    # Python calls this before its own function, which was registered when multiprocessing was imported.
    atexit.register(kill)


def _init_worker(worker: int) -> None:
    """Ignore signals, which Slurm sends to every process: a dead worker would end the run before it saves."""
    ignore_signals()
    die_with_parent()


@dataclass
class ValidationDataset(Dataset[MicroBatch]):
    """The validation samples of one rank. Each sample is on one rank, and all ranks have equally many items."""

    samples: Samples
    layout: list[MicroLayout]
    packing: bool
    pad_id: int

    def __getitem__(self, index: int) -> MicroBatch:
        micro = self.layout[index]
        return collate(self.samples, list(micro.members), packing=self.packing, pad_id=self.pad_id, filler=micro.filler)

    def __len__(self) -> int:
        return len(self.layout)


def validation_loader(
    samples: Samples, *, rank: int, world_size: int, limits: Limits, packing: bool, pad_id: int
) -> DataLoader[MicroBatch]:
    # Without a limit on samples the whole set would be one micro-batch. 64 keep a laptop busy and fit into its memory.
    limits = Limits(max_samples=limits.max_samples or 64, max_tokens=limits.max_tokens)
    layout = assign_micro_batches(
        samples.lengths(np.arange(len(samples))).tolist(), world_size, limits, packing=packing
    )[rank]
    return DataLoader(ValidationDataset(samples, layout, packing, pad_id), batch_size=None, shuffle=False)
