"""Count the micro-batches per step of a run, and measure the largest one."""

from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from qwlit.config.run import RunConfig
from qwlit.data.step_plan import StepPlan
from qwlit.planning.memory.state import MicroShape

# In a longer run, only this many steps and samples are measured, at equal distances. That takes half a second.
MOST_STEPS, MOST_SAMPLES = 2000, 200_000


@dataclass(frozen=True)
class BatchStatistics:
    """Sizes and averages over the steps of a run."""

    largest: MicroShape
    """An upper bound on all micro-batches: the largest value of each field."""
    accumulation: tuple[int, float, int]
    """Micro-batches per rank and step: minimum, median, maximum."""
    tokens_per_step: float
    """Average over the steps, of all ranks together."""
    supervised_share: float
    """Supervised tokens / tokens, 0 to 1."""
    pairs_per_token: float
    """Earlier tokens that a token attends to, on average."""
    padding_share: float | None
    """Padding / positions computed, 0 to 1; None if not known."""


def measure_batches(plan: StepPlan, total_steps: int) -> BatchStatistics:
    """Assign the samples of all steps, or of some steps of a long run, to micro-batches and measure them."""
    counts, tokens, positions = [], [], []
    num_supervised, num_pairs = 0, 0.0
    largest = MicroShape(0, 0, 0.0, plan.packing)
    num_measured = min(total_steps, MOST_STEPS, max(1, MOST_SAMPLES // plan.global_batch_size))
    for step in np.unique(np.linspace(0, total_steps - 1, num_measured).astype(int)).tolist():
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
    """Assume the largest batches if the data are not known: samples of `data.max_seq_len` tokens, all supervised."""
    max_samples, max_tokens = config.hardware.micro_batch_limits
    length, per_rank = config.data.max_seq_len, -(-config.train.global_batch_size // world_size)
    samples = min(per_rank, max_samples or per_rank)
    if max_tokens is not None:
        samples = min(samples, max(1, max_tokens // length))
    tokens, count = samples * length, -(-per_rank // samples)
    return BatchStatistics(
        largest=MicroShape(tokens, tokens, float(tokens * length), config.data.packing, accumulates=count > 1),
        accumulation=(count, count, count),
        tokens_per_step=float(config.train.global_batch_size * length),
        supervised_share=1.0,
        pairs_per_token=length / 2,
        padding_share=None,
    )
