"""Build the RunPlan: everything that is known about a run before its weights are loaded. `train` and `plan` use it."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from rich.console import Console

from qwlit.config.compose import Composed
from qwlit.config.run import RunConfig
from qwlit.core.devices import GIB, USUAL_MFU
from qwlit.core.errors import ConfigError, DataError
from qwlit.data.config import parts_of
from qwlit.data.readers import RowReader
from qwlit.data.rows import NeedsTokenizer, Row
from qwlit.data.sources import File, find_sources
from qwlit.data.splits import DataSplit, split_data
from qwlit.data.step_plan import num_steps
from qwlit.data.store import DamagedStore
from qwlit.model.config import Execution
from qwlit.model.flops import Flops, count_flops
from qwlit.optim.schedules import Schedule
from qwlit.planning.batch_statistics import BatchStatistics
from qwlit.planning.facts import facts_of
from qwlit.planning.memory.estimate import MemoryEstimate
from qwlit.planning.memory.whole_run import bytes_by_phase
from qwlit.planning.micro_batches import plan_batches
from qwlit.planning.preflight.rules import Finding, refuse, run_rules
from qwlit.planning.price import Price, price_of
from qwlit.planning.saves import SavePlan, plan_saves
from qwlit.planning.setup import Setup, forget_meta_models, resolve_setup
from qwlit.planning.steps import PlannedSteps, plan_schedule
from qwlit.planning.tokenized_data import TokenizedData, is_small_or_tokenized, load_tokenized_data
from qwlit.training.machine import Machine

# `plan` tokenizes at most this much, which takes a second or two; it leaves more to `inspect` and `train`.
MOST_BYTES = 4 * 2**20


@dataclass(frozen=True)
class PlannedData:
    """The data and the steps of the run."""

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
    """Everything about a run except its weights."""

    setup: Setup
    batches: BatchStatistics
    memory: MemoryEstimate
    flops: Flops
    data: PlannedData | None
    """None only for `plan`, if it did not read the data."""
    not_checked: str | None
    """Why data and tokenizer were not read; None if they were."""
    schedule: Schedule | None
    """Learning-rate schedule with the number of steps; None if that is not known."""
    findings: list[Finding]

    @property
    def planned_data(self) -> PlannedData:
        """The data, for a run that is not only a preview."""
        assert self.data is not None
        return self.data

    @property
    def config(self) -> RunConfig:
        return self.setup.config

    @property
    def machine(self) -> Machine:
        return self.setup.machine

    @property
    def execution(self) -> Execution:
        return self.setup.execution

    @cached_property
    def saves(self) -> SavePlan:
        return plan_saves(self.setup.groups, self.config.optim, self.machine, self.memory)

    @property
    def copy_bytes(self) -> float:
        """Bytes of device memory that the copy of a checkpoint takes."""
        return self.saves.device_copy_bytes(self.machine)

    @cached_property
    def bytes_by_phase(self) -> dict[str, float]:
        """The memory of each phase of the run on one device, see `bytes_by_phase`."""
        setup, micro = self.setup, self.batches.largest
        return bytes_by_phase(
            setup.config, setup.model, setup.machine, setup.execution, self.memory, micro, copy=self.copy_bytes
        )

    @property
    def price(self) -> Price:
        """What the level of memory costs in time."""
        return price_of(self)

    @property
    def peak_bytes(self) -> float:
        """The largest memory that the run needs on one device."""
        return max(self.bytes_by_phase.values())

    @property
    def fits(self) -> bool | None:
        """Whether the whole run fits; None if the device's memory is unknown."""
        return self.peak_bytes <= self.memory.device if self.memory.device else None

    @property
    def accumulate_grad_batches(self) -> int:
        """Micro-batches per rank and step. With micro_batch_tokens steps differ, and this is the median."""
        return round(self.batches.accumulation[1])

    @property
    def flops_per_token(self) -> float:
        """FLOPs of forward and backward pass per token, averaged over the measured steps."""
        flops, batches = self.flops, self.batches
        supervised = batches.supervised_share * flops.per_supervised_token
        return flops.per_token + supervised + batches.pairs_per_token * flops.per_token_pair

    @property
    def num_tokens(self) -> float | None:
        """Tokens of the whole run, counted again in each epoch. An upper bound if the data are not known."""
        return None if self.schedule is None else self.schedule.total_steps * self.batches.tokens_per_step

    def seconds(self, mfu: float) -> float | None:
        """Return the training time at this share of the devices' peak; None if the steps or the peak are not known."""
        machine = self.machine
        if self.num_tokens is None or machine.peak_flops is None:
            return None
        return self.num_tokens * self.flops_per_token / (machine.peak_flops * machine.world_size * mfu)

    def expected(self) -> dict[str, Any]:
        """Return what manifest.json keeps, for `report` to compare with what the run measures; unknown values are None.

        `seconds` are those of all steps at the share `mfu` of the devices' peak; `memory_gib` is that of the training
        on one device.
        """
        steps = self.schedule.total_steps if self.schedule else None
        numbers = {"steps": steps, "tokens": self.num_tokens, "memory_gib": self.bytes_by_phase["training"] / GIB}
        return numbers | {"mfu": USUAL_MFU, "seconds": self.seconds(USUAL_MFU)}


def build_plan(
    composed: Composed, screen: Console, *, machine: Machine | None = None, preview: bool = False
) -> RunPlan:
    """Resolve everything that the run needs except the weights; tokenize data that are not tokenized yet.

    Args:
        screen: shows the progress of tokenizing.
        machine: that of the run, if it is resolved already.
        preview: take the devices from the hardware profile and do not inspect this machine, skip data that are missing
            or large, and keep the findings instead of refusing the run.

    Raises:
        ConfigError, DataError: a setting, file or device is missing or wrong, or a preflight rule refuses the run.
    """
    try:
        return _build_plan(composed, screen, machine=machine, preview=preview)
    except DamagedStore:
        # It is marked now, so opening it builds it again.
        return _build_plan(composed, screen, machine=machine, preview=preview)


def _build_plan(composed: Composed, screen: Console, *, machine: Machine | None, preview: bool) -> RunPlan:
    config = composed.config
    forget_meta_models()
    setup = resolve_setup(composed, machine=machine, trust_profile=preview)
    if not preview:
        # Refuse the run before tokenizing, which can take long, if the settings alone make it impossible.
        refuse(run_rules(facts_of(setup)))
    tokenized, not_checked = (
        _data_for_preview(config, screen) if preview else (load_tokenized_data(config, screen), None)
    )
    split = None if tokenized is None else split_data(config.data, tokenized.training, tokenized.validation)
    setup, steps, batches = plan_batches(setup, split)
    data = PlannedData(tokenized, split, steps) if tokenized and split and steps else None
    schedule = _schedule_by_rows(config) if steps is None else steps.schedule
    fitted, memory = setup.fit_memory(batches.largest)
    known = (data.split, data.tokenized.tokenizer) if data else (None, None)
    findings = run_rules(facts_of(fitted, batches.largest, memory, schedule, *known))
    if not preview:
        refuse(findings)
    flops = count_flops(setup.model)
    return RunPlan(fitted, batches, memory, flops, data, not_checked, schedule, findings)


def _data_for_preview(config: RunConfig, screen: Console) -> tuple[TokenizedData | None, str | None]:
    """Return the tokenized data, or the reason for not reading them.

    Raises:
        DataError: the data exist but cannot be used.
    """
    try:
        if not is_small_or_tokenized(config, MOST_BYTES):
            return None, "the data are large and not tokenized yet; run `inspect` or `train` with the same overrides"
    except DataError as error:
        return None, str(error)  # the data may be on the machine that will train
    try:
        # `plan` answers no prompts, so rows that are tokens already need no tokenizer.
        return load_tokenized_data(replace(config, data=replace(config.data, exact_match=0)), screen), None
    except (ConfigError, NeedsTokenizer) as error:
        return None, str(error)


def _schedule_by_rows(config: RunConfig) -> Schedule | None:
    """Estimate the steps from the number of rows, as if every row became one sample; None if there are too many."""
    train = config.train
    if train.max_epochs is None:
        return plan_schedule(config, None)
    rows = _count_rows(config)
    if rows is None:
        return None
    return plan_schedule(config, num_steps(train.max_epochs, rows, train.global_batch_size))


def _count_rows(config: RunConfig) -> int | None:
    data = config.data
    try:
        parts = [find_sources(part.path) for part in parts_of(data.path)]
        sources = [source for part in parts for source in part]
        files = [source for source in sources if isinstance(source, File)]
        if len(files) < len(sources) or sum(file.num_bytes() for file in files) > MOST_BYTES:
            return None
        counts = [sum(isinstance(row, Row) for row in RowReader(part)) for part in parts]
        rows = sum(min(count, data.max_samples or count) for count in counts)
    except (ConfigError, DataError):
        return None
    return round(rows * (1 - data.val_fraction)) or None
