"""Statistics of the run's steps: how many micro-batches they have, and how large the largest is."""

from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from qwlit.config.run import RunConfig
from qwlit.data.step_plan import StepPlan
from qwlit.planning.memory.state import MicroShape

# Of longer runs so many steps and samples are looked at, spread evenly: half a second.
MOST_STEPS, MOST_SAMPLES = 2000, 200_000


@dataclass(frozen=True)
class BatchStatistics:
    """What the steps of a run are like."""

    largest: MicroShape
    """The micro-batch that takes the most memory."""
    accumulation: tuple[int, float, int]
    """Micro-batches of a device and step: fewest, median, most."""
    tokens_per_step: float
    supervised_share: float
    """Of the tokens."""
    pairs_per_token: float
    """Tokens that one looks back upon, on average."""
    padding_share: float | None
    """Of the positions computed."""


def measure_batches(plan: StepPlan, total_steps: int) -> BatchStatistics:
    """Lay out the steps (of long runs a part) and note the largest micro-batch."""
    counts, tokens, positions = [], [], []
    num_supervised, num_pairs = 0, 0.0
    largest = MicroShape(0, 0, 0.0, plan.packing)
    num_looked_at = min(total_steps, MOST_STEPS, max(1, MOST_SAMPLES // plan.global_batch_size))
    for step in np.unique(np.linspace(0, total_steps - 1, num_looked_at).astype(int)).tolist():
        ids = plan.samples(step)
        lengths, supervised = plan.train.lengths(ids), plan.train.num_supervised(ids)
        layout = plan.layout(ids)
        counts.append(len(layout[0]))
        tokens.append(int(lengths.sum()))
        num_supervised += int(supervised.sum())
        num_pairs += float((lengths.astype(float) ** 2).sum()) / 2
        computed = 0
        for micro in (micro for rank in layout for micro in rank if not micro.filler):
            members = list(micro.members)
            width = lengths[members].max() * len(members)
            size = int(lengths[members].sum() if plan.packing else width)
            computed += size
            pairs = (lengths[members].astype(float) ** 2).sum() if plan.packing else width * lengths[members].max()
            largest = MicroShape(
                max(largest.tokens, size),
                max(largest.supervised, int(supervised[members].sum())),
                max(largest.token_pairs, float(pairs)),
                plan.packing,
            )
        positions.append(computed)
    return BatchStatistics(
        largest=replace(largest, accumulates=max(counts) > 1),
        accumulation=(min(counts), median(counts), max(counts)),
        tokens_per_step=float(np.mean(tokens)),
        supervised_share=num_supervised / sum(tokens),
        pairs_per_token=num_pairs / sum(tokens),
        padding_share=1 - sum(tokens) / sum(positions),
    )


def assume_batches(config: RunConfig, world_size: int) -> BatchStatistics:
    """Assume the most, where the data are not known: samples of `data.max_seq_len` tokens, all supervised."""
    hardware, length = config.hardware, config.data.max_seq_len
    each = -(-config.train.global_batch_size // world_size)
    rows = min(each, hardware.micro_batch_size or each)
    if hardware.micro_batch_tokens is not None:
        rows = min(rows, max(1, hardware.micro_batch_tokens // length))
    tokens, count = rows * length, -(-each // rows)
    return BatchStatistics(
        largest=MicroShape(tokens, tokens, float(tokens * length), config.data.packing, accumulates=count > 1),
        accumulation=(count, count, count),
        tokens_per_step=float(config.train.global_batch_size * length),
        supervised_share=1.0,
        pairs_per_token=length / 2,
        padding_share=None,
    )
