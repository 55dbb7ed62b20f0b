"""What `train` with the same settings would do, found out without doing it: no weights, no GPU."""

from dataclasses import dataclass, replace

from rich.console import Console

from qwlit.config.compose import Composed, compose
from qwlit.core.errors import ConfigError, DataError
from qwlit.data.config import parts_of
from qwlit.data.readers import RowReader
from qwlit.data.rows import NeedsTokenizer, Row
from qwlit.data.sources import File, find_sources
from qwlit.data.splits import DataSplit, split_data
from qwlit.model.config import LADDER
from qwlit.model.flops import Flops, count_flops
from qwlit.optim.schedules import Schedule, build_schedule
from qwlit.planning.batch_statistics import Survey, assume_steps, survey_steps
from qwlit.planning.corpus import Corpus, is_small_or_tokenized, open_corpus
from qwlit.planning.facts import facts_of
from qwlit.planning.memory.estimate import MemoryEstimate
from qwlit.planning.outline import Outline, draw_outline
from qwlit.planning.preflight import Finding, find
from qwlit.planning.steps import accumulation, derive, plan_steps

# Read and tokenized in a second or two; more is left to `inspect` and `train`.
MOST_BYTES = 4 * 2**20
REMEDIES_SHOWN = 4


@dataclass(frozen=True)
class Foresight:
    """A run that has not been made."""

    outline: Outline
    survey: Survey
    memory: MemoryEstimate
    flops: Flops
    data: DataSplit | None
    unchecked: str | None
    """Why data and tokenizer were not looked at."""
    schedule: Schedule | None
    """With the number of steps; None where it is not known."""
    findings: list[Finding]
    remedies: list[tuple[list[str], MemoryEstimate]]
    """Overrides that make it fit, cheapest first; empty where it fits."""

    @property
    def accumulate_grad_batches(self) -> int:
        """Micro-batches of a device and step: as set, or of a step in the middle."""
        config = self.outline.config
        if config.hardware.micro_batch_tokens is None:
            size = config.hardware.micro_batch_size
            return accumulation(config.train.global_batch_size, size, self.outline.machine.world_size) or 1
        return round(self.survey.accumulation[1])

    @property
    def flops_per_token(self) -> float:
        """Forward and backward, over the steps looked at."""
        flops, survey = self.flops, self.survey
        supervised = survey.supervised_share * flops.per_supervised_token
        return flops.per_token + supervised + survey.pairs_per_token * flops.per_token_pair

    @property
    def num_tokens(self) -> float | None:
        """Of the whole run, repeated ones counted again; at most so many where the data are not known."""
        return None if self.schedule is None else self.schedule.total_steps * self.survey.tokens_per_step

    def seconds(self, mfu: float) -> float | None:
        """Return the training time at that share of the devices' peak; None where steps or peak are not known."""
        machine = self.outline.machine
        if self.num_tokens is None or machine.peak_flops is None:
            return None
        return self.num_tokens * self.flops_per_token / (machine.peak_flops * machine.world_size * mfu)


def foresee(words: list[str], screen: Console) -> Foresight:
    """Compose the settings and find out what they would do.

    Raises:
        ConfigError, DataError: settings or data are wrong. What is only not reachable here does not raise.
    """
    composed = compose(words)
    config = composed.config
    outline = draw_outline(composed, imagined=True)
    corpus, unchecked = _reachable_corpus(outline, screen)
    if corpus is None:
        data = None
        survey, schedule = assume_steps(config, outline.machine.world_size), _schedule_by_rows(outline)
    else:
        data = split_data(config.data, corpus.training, corpus.validation)
        survey, schedule = _look_through(outline, data)
    settled, memory = outline.settle(survey.load)
    tokenizer = corpus.tokenizer if corpus else None
    return Foresight(
        outline=settled,
        survey=survey,
        memory=memory,
        flops=count_flops(outline.subject.model),
        data=data,
        unchecked=unchecked,
        schedule=schedule,
        findings=find(facts_of(settled, memory, schedule, data, tokenizer)),
        remedies=_remedies(words, composed, data) if memory.fits is False else [],
    )


def _reachable_corpus(outline: Outline, screen: Console) -> tuple[Corpus | None, str | None]:
    """Return the tokenized data, or why they are not looked at; data that are here and unusable are an error."""
    config = outline.config
    try:
        if not is_small_or_tokenized(config, MOST_BYTES):
            return None, "the data are not tokenized yet, and many; `inspect` or `train` with the same words does it"
    except DataError as error:
        return None, str(error)  # they may be where it will run
    try:
        # Nothing will be answered, so that rows of tokens need no tokenizer.
        return open_corpus(replace(config, data=replace(config.data, exact_match=0)), screen), None
    except (ConfigError, NeedsTokenizer) as error:
        return None, str(error)


def _look_through(outline: Outline, data: DataSplit) -> tuple[Survey, Schedule]:
    plan = plan_steps(outline.config, data, outline.machine.world_size)
    plan.limits.check(data.train)
    schedule = derive(outline.config, plan, has_validation=data.validation is not None).schedule
    return survey_steps(plan, schedule.total_steps), schedule


def _schedule_by_rows(outline: Outline) -> Schedule | None:
    """Count rows instead of samples, where they are few enough to count; as if every one of them was used."""
    config = outline.config
    train = config.train
    asked = [train.max_steps] if train.max_steps else []
    rows = _count_rows(outline)
    if train.max_epochs and rows is None:
        return None
    if train.max_epochs and rows is not None:
        asked.append(-(-train.max_epochs * rows // train.global_batch_size))
    return build_schedule(config.scheduler, min(asked))


def _count_rows(outline: Outline) -> int | None:
    data = outline.config.data
    try:
        sources = [source for part in parts_of(data.path) for source in find_sources(part.path)]
        files = [source for source in sources if isinstance(source, File)]
        if len(files) < len(sources) or sum(file.num_bytes() for file in files) > MOST_BYTES:
            return None
        rows = sum(isinstance(row, Row) for row in RowReader(files))
    except (ConfigError, DataError):
        return None
    return round(rows * (1 - data.val_fraction)) or None


def _remedies(words: list[str], composed: Composed, data: DataSplit | None) -> list[tuple[list[str], MemoryEstimate]]:
    """Try what makes a run smaller, cheapest first, and return what fits."""
    found: list[tuple[list[str], MemoryEstimate]] = []
    for overrides in _smaller(composed):
        if any(set(fitting) <= set(overrides) for fitting, _ in found):
            continue  # less would do
        try:
            outline = draw_outline(_changed(words, composed, overrides), imagined=True)
            world_size = outline.machine.world_size
            survey = assume_steps(outline.config, world_size) if data is None else _look_through(outline, data)[0]
            _, estimate = outline.settle(survey.load)
        except ConfigError:
            continue
        if estimate.fits:
            found.append((overrides, estimate))
        if len(found) == REMEDIES_SHOWN:
            break
    return found


def _changed(words: list[str], composed: Composed, overrides: list[str]) -> Composed:
    """Return the settings with more overrides. Composing takes a fifth of a second, so single values are put in."""
    if any(override.startswith("recipe=") for override in overrides):
        return compose([*words, *overrides])
    config = composed.config
    for override in overrides:
        key, _, value = override.partition("=")
        section, _, name = key.partition(".")
        new: object = int(value) if value.isdecimal() else value
        config = replace(config, **{section: replace(getattr(config, section), **{name or "name": new})})
    return replace(composed, config=config)


def _smaller(composed: Composed) -> list[list[str]]:
    """List overrides, from what costs only time to what trains something else, to more machines."""
    config = composed.config
    hardware = config.hardware
    on_cpu, from_scratch = hardware.accelerator == "cpu", config.model.init == "random"
    rungs = LADDER[LADDER.index(hardware.memory) + 1 :] if hardware.memory != "auto" else ()
    one_row = [] if hardware.micro_batch_size == 1 else ["hardware.micro_batch_size=1"]
    tokens = hardware.micro_batch_tokens
    ways = [["hardware.strategy=auto"]] if hardware.strategy == "ddp" else []
    ways += [[f"hardware.memory={rung}"] for rung in rungs]
    ways += [[f"hardware.micro_batch_tokens={tokens // part}"] for part in (2, 4) if tokens and tokens >= 2 * part]
    ways += [one_row] if one_row else []
    if composed.choices:
        optimizers = ["adamw_8bit"] if on_cpu else ["adamw_8bit", "paged_adamw_8bit"]
        recipes = [] if from_scratch else ["recipe=lora", "recipe=qlora"]
        for way in (*(f"optim={name}" for name in optimizers), *recipes):
            ways += [[way], [way, *one_row]]
    devices = hardware.devices
    first = 1 if devices == "auto" else devices
    return ways + [[f"hardware.devices={count}"] for count in (2, 4, 8) if count > first and not on_cpu]
