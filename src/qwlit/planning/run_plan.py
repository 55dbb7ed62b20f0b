"""RunPlan: everything about a run that is known before its weights are loaded. `train` and `plan` start from it."""

from dataclasses import dataclass, replace

from rich.console import Console

from qwlit.config.compose import Composed
from qwlit.config.run import RunConfig
from qwlit.core.errors import ConfigError, DataError
from qwlit.data.config import parts_of
from qwlit.data.readers import RowReader
from qwlit.data.rows import NeedsTokenizer, Row
from qwlit.data.sources import File, find_sources
from qwlit.data.splits import DataSplit, split_data
from qwlit.model.config import Execution
from qwlit.model.flops import Flops, count_flops
from qwlit.optim.schedules import Schedule, build_schedule
from qwlit.planning.batch_statistics import BatchStatistics, assume_batches, measure_batches
from qwlit.planning.facts import facts_of
from qwlit.planning.memory.estimate import MemoryEstimate
from qwlit.planning.preflight import Finding, find, refuse
from qwlit.planning.setup import Setup, forget_meta_models, resolve_setup
from qwlit.planning.steps import PlannedSteps, accumulation, plan_steps
from qwlit.planning.tokenized_data import TokenizedData, is_small_or_tokenized, load_tokenized_data
from qwlit.training.machine import Machine

# Read and tokenized in a second or two; more is left to `inspect` and `train`.
MOST_BYTES = 4 * 2**20


@dataclass(frozen=True)
class PlannedData:
    """The data, and the steps that go through them."""

    tokenized: TokenizedData
    split: DataSplit
    steps: PlannedSteps

    @property
    def pad_id(self) -> int:
        tokenizer = self.tokenized.tokenizer
        pad = tokenizer.pad_token_id if tokenizer else None
        return 0 if pad is None else int(pad)


@dataclass(frozen=True)
class RunPlan:
    """A run before it is made."""

    setup: Setup
    batches: BatchStatistics
    memory: MemoryEstimate
    flops: Flops
    data: PlannedData | None
    """None only for `plan`, where the data were not looked at."""
    not_checked: str | None
    """Why data and tokenizer were not looked at."""
    schedule: Schedule | None
    """With the number of steps; None where it is not known."""
    findings: list[Finding]

    @property
    def config(self) -> RunConfig:
        return self.setup.config

    @property
    def machine(self) -> Machine:
        return self.setup.machine

    @property
    def execution(self) -> Execution:
        return self.setup.execution

    @property
    def accumulate_grad_batches(self) -> int:
        """Micro-batches of a device and step: as set, or of a step in the middle."""
        hardware = self.config.hardware
        if hardware.micro_batch_tokens is None:
            size = self.config.train.global_batch_size
            return accumulation(size, hardware.micro_batch_size, self.machine.world_size) or 1
        return round(self.batches.accumulation[1])

    @property
    def flops_per_token(self) -> float:
        """Forward and backward, over the steps looked at."""
        flops, batches = self.flops, self.batches
        supervised = batches.supervised_share * flops.per_supervised_token
        return flops.per_token + supervised + batches.pairs_per_token * flops.per_token_pair

    @property
    def num_tokens(self) -> float | None:
        """Of the whole run, repeated ones counted again; at most so many where the data are not known."""
        return None if self.schedule is None else self.schedule.total_steps * self.batches.tokens_per_step

    def seconds(self, mfu: float) -> float | None:
        """Return the training time at that share of the devices' peak; None where steps or peak are not known."""
        machine = self.machine
        if self.num_tokens is None or machine.peak_flops is None:
            return None
        return self.num_tokens * self.flops_per_token / (machine.peak_flops * machine.world_size * mfu)


def build_plan(composed: Composed, screen: Console, *, preview: bool = False) -> RunPlan:
    """Resolve everything that the run needs but the weights; tokenize what is not yet tokenized.

    Args:
        screen: shows how the tokenizing goes.
        preview: take the hardware profile's word for the machine, leave out data that are not here or too many to
            tokenize in passing, and keep findings instead of refusing the run.

    Raises:
        ConfigError, DataError: something that is asked for is not here, or wrong; or a preflight rule refuses the run.
    """
    config = composed.config
    forget_meta_models()
    setup = resolve_setup(composed, imagined=preview)
    if not preview:
        # What the settings alone condemn need not wait for the tokenizer.
        refuse(find(facts_of(setup)))
    tokenized, not_checked = _reachable_data(config, screen) if preview else (load_tokenized_data(config, screen), None)
    data = None if tokenized is None else _plan_data(setup, tokenized)
    if data is None:
        batches, schedule = assume_batches(config, setup.machine.world_size), _schedule_by_rows(config)
    else:
        schedule = data.steps.schedule
        batches = measure_batches(data.steps.step_plan, schedule.total_steps)
    settled, memory = setup.settle(batches.largest)
    known = (data.split, data.tokenized.tokenizer) if data else (None, None)
    findings = find(facts_of(settled, memory, schedule, *known))
    if not preview:
        refuse(findings)
    flops = count_flops(setup.model)
    return RunPlan(settled, batches, memory, flops, data, not_checked, schedule, findings)


def _plan_data(setup: Setup, tokenized: TokenizedData) -> PlannedData:
    split = split_data(setup.config.data, tokenized.training, tokenized.validation)
    return PlannedData(tokenized, split, plan_steps(setup.config, split, setup.machine.world_size))


def _reachable_data(config: RunConfig, screen: Console) -> tuple[TokenizedData | None, str | None]:
    """Return the tokenized data, or why they are not looked at; data that are here and unusable are an error."""
    try:
        if not is_small_or_tokenized(config, MOST_BYTES):
            return None, "the data are not tokenized yet, and many; `inspect` or `train` with the same words does it"
    except DataError as error:
        return None, str(error)  # they may be where it will run
    try:
        # Nothing will be answered, so that rows of tokens need no tokenizer.
        return load_tokenized_data(replace(config, data=replace(config.data, exact_match=0)), screen), None
    except (ConfigError, NeedsTokenizer) as error:
        return None, str(error)


def _schedule_by_rows(config: RunConfig) -> Schedule | None:
    """Count rows instead of samples, where they are few enough to count; as if every one of them was used."""
    train = config.train
    asked = [train.max_steps] if train.max_steps else []
    rows = _count_rows(config)
    if train.max_epochs and rows is None:
        return None
    if train.max_epochs and rows is not None:
        asked.append(-(-train.max_epochs * rows // train.global_batch_size))
    return build_schedule(config.scheduler, min(asked))


def _count_rows(config: RunConfig) -> int | None:
    data = config.data
    try:
        sources = [source for part in parts_of(data.path) for source in find_sources(part.path)]
        files = [source for source in sources if isinstance(source, File)]
        if len(files) < len(sources) or sum(file.num_bytes() for file in files) > MOST_BYTES:
            return None
        rows = sum(isinstance(row, Row) for row in RowReader(files))
    except (ConfigError, DataError):
        return None
    return round(rows * (1 - data.val_fraction)) or None
