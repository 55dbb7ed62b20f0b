"""Resolve the limits of a micro-batch that are "auto", and measure the micro-batches of the run."""

from dataclasses import replace

from qwlit.data.samples import longest
from qwlit.data.splits import DataSplit
from qwlit.planning.batch_statistics import BatchStatistics, assume_batches, measure_batches
from qwlit.planning.memory.levels import candidates
from qwlit.planning.setup import Setup
from qwlit.planning.steps import PlannedSteps, plan_steps

SIZE_ON_CPU = 4
"""Samples per micro-batch: micro_batch_size=auto on CPU."""
MOST_TOKENS = 16_384
"""Tokens per micro-batch from which a GPU computes no faster. Assumption, not measured."""


def plan_batches(setup: Setup, split: DataSplit | None) -> tuple[Setup, PlannedSteps | None, BatchStatistics]:
    """Resolve the limits, plan the steps, and measure their micro-batches.

    Args:
        split: None where the data are not known. Then there are no steps, and the largest batches are assumed.

    Raises:
        ConfigError: a sample is longer than hardware.micro_batch_tokens.
    """
    hardware, on_cpu = setup.config.hardware, setup.machine.accelerator == "cpu"
    if hardware.micro_batch_size == "auto":
        setup = _limited(setup, micro_batch_size=SIZE_ON_CPU if on_cpu else None)
    if hardware.micro_batch_tokens == "auto":
        setup = _limited(setup, micro_batch_tokens=None) if on_cpu else _fill_memory(setup, split)
    return setup, *_measured(setup, split)


def _fill_memory(setup: Setup, split: DataSplit | None) -> Setup:
    """Take the most tokens that fit at the level of memory which the longest sample alone needs.

    More tokens at a level that keeps less of the forward pass would cost more time than they save.
    """
    sets = [] if split is None else [samples for samples in (split.train, split.validation) if samples]
    shortest = max((longest(samples) for samples in sets), default=setup.config.data.max_seq_len)
    found = _limited(setup, micro_batch_tokens=shortest)
    level = _level(found, split)
    tokens = 1 << shortest.bit_length()
    while level is not None and tokens <= MOST_TOKENS:
        larger = _limited(setup, micro_batch_tokens=tokens)
        needed = _level(larger, split)
        # A run without accumulation may need less memory than one with it.
        if needed is None or needed > level:
            break
        found, level, tokens = larger, needed, 2 * tokens
    return found


def _level(setup: Setup, split: DataSplit | None) -> int | None:
    """Return the place of the fastest level of memory that fits; None if none does, or the memory is unknown.

    How often FSDP2 reduces gradients does not count: twice the tokens gather the weights half as often, which saves as
    much communication as reducing the gradients in each micro-batch costs.
    """
    _, batches = _measured(setup, split)
    fitted, memory = setup.fit_memory(batches.largest)
    levels = candidates(setup.config, setup.machine, setup.groups)
    return levels.index(replace(fitted.machine, reduce_once=True)) if memory.fits else None


def _measured(setup: Setup, split: DataSplit | None) -> tuple[PlannedSteps | None, BatchStatistics]:
    world_size = setup.machine.world_size
    if split is None:
        return None, assume_batches(setup.config, world_size)
    steps = plan_steps(setup.config, split, world_size)
    return steps, measure_batches(steps.step_plan, steps.total_steps)


def _limited(setup: Setup, **limits: int | None) -> Setup:
    config = setup.config
    hardware = replace(config.hardware, **limits)  # type: ignore[arg-type]
    return replace(setup, composed=replace(setup.composed, config=replace(config, hardware=hardware)))
