"""What `train` with the same settings would do, found out without doing it: no weights, no GPU."""

from dataclasses import dataclass, replace

from rich.console import Console

from qwlit.config.compose import Composed, compose
from qwlit.config.derive import Derived, accumulation, derive, plan_steps
from qwlit.config.memory import LADDER, MemoryEstimate
from qwlit.config.preflight import Finding, find
from qwlit.core.errors import ConfigError, DataError
from qwlit.data.config import parts_of
from qwlit.data.readers import RowReader
from qwlit.data.rows import Row
from qwlit.data.samples import count_tokens
from qwlit.data.sources import File, find_sources
from qwlit.data.splits import DataSplit, split_data
from qwlit.job.corpus import Corpus, is_small_or_tokenized, open_corpus
from qwlit.job.facts import facts_of
from qwlit.job.outline import Outline, draw_outline
from qwlit.job.survey import Survey, assume_steps, survey_steps
from qwlit.model.flops import Flops, count_flops
from qwlit.optim.schedules import Schedule, build_schedule

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
    num_steps: int | None
    schedule: Schedule | None
    derived: Derived | None
    findings: list[Finding]
    remedies: list[tuple[list[str], MemoryEstimate]]
    """Overrides that make it fit, cheapest first; empty where it fits."""

    @property
    def accumulate_grad_batches(self) -> int:
        """Micro-batches of a device and step: as set, or of a step in the middle."""
        config, machine = self.outline.config, self.outline.machine
        if config.hardware.micro_batch_tokens is None or self.survey.accumulation is None:
            size = config.hardware.micro_batch_size
            return accumulation(config.train.global_batch_size, size, machine.world_size) or 1
        return round(self.survey.accumulation[1])

    @property
    def flops_per_token(self) -> float:
        """Forward and backward, over the data where they are known, else over full samples learnt whole."""
        if self.data is None:
            length, share = float(self.outline.config.data.max_seq_len), 1.0
        else:
            num_tokens, supervised = count_tokens(self.data.train)
            length, share = num_tokens / len(self.data.train), supervised / num_tokens
        # A document's token looks back over half of it on average.
        flops = self.flops
        return flops.per_token + share * flops.per_supervised_token + flops.per_token_pair * length / 2

    @property
    def num_tokens(self) -> float | None:
        """Of the whole run, repeated ones counted again; at most so many where the data are not known."""
        return None if self.num_steps is None else self.num_steps * self.survey.tokens_per_step

    def seconds(self, mfu: float) -> float | None:
        """Return the training time at that share of the devices' peak; None where steps or peak are not known."""
        machine = self.outline.machine
        if self.num_tokens is None or machine.peak_flops is None:
            return None
        return self.num_tokens * self.flops_per_token / (machine.peak_flops * machine.world_size * mfu)


def foresee(words: list[str], screen: Console) -> Foresight:
    """Compose the settings and find out what they would do.

    Raises:
        ConfigError: the settings are wrong. What is only not reachable here does not raise.
    """
    composed = compose(words)
    config = composed.config
    outline = draw_outline(composed, imagined=True)
    corpus, unchecked = _reachable_corpus(outline, screen)
    data = derived = None
    survey = assume_steps(config, outline.machine.world_size)
    num_steps, schedule = _steps_without_data(outline)
    if corpus is not None:
        try:
            data = split_data(config.data, corpus.training, corpus.validation)
        except DataError as error:
            unchecked = str(error)
    if data is not None:
        plan = plan_steps(config, data, outline.machine.world_size)
        plan.limits.check(data.train)
        derived = derive(config, plan, has_validation=data.validation is not None)
        num_steps, schedule = derived.total_steps, derived.schedule
        survey = survey_steps(plan, derived.total_steps)
    settled, memory = outline.settle(survey.load)
    tokenizer = corpus.tokenizer if corpus else None
    return Foresight(
        outline=settled,
        survey=survey,
        memory=memory,
        flops=count_flops(outline.subject.model),
        data=data,
        unchecked=unchecked,
        num_steps=num_steps,
        schedule=schedule,
        derived=derived,
        findings=find(facts_of(settled, memory, derived, data, tokenizer)),
        remedies=_remedies(words, composed, survey) if memory.fits is False else [],
    )


def _reachable_corpus(outline: Outline, screen: Console) -> tuple[Corpus | None, str | None]:
    """Return the tokenized data, or why they are not looked at."""
    config = outline.config
    try:
        if not is_small_or_tokenized(config, MOST_BYTES):
            return None, "the data are not tokenized yet, and many; `inspect` or `train` with the same words does it"
        # Nothing will be answered, so that rows of tokens need no tokenizer.
        return open_corpus(replace(config, data=replace(config.data, exact_match=0)), screen), None
    except (ConfigError, DataError) as error:
        return None, str(error)


def _steps_without_data(outline: Outline) -> tuple[int | None, Schedule | None]:
    """Count rows instead of samples, where they are few enough to count; as if every one of them was used."""
    config = outline.config
    train = config.train
    asked = [train.max_steps] if train.max_steps else []
    rows = _count_rows(outline)
    if train.max_epochs and rows is None:
        return None, None
    if train.max_epochs and rows is not None:
        asked.append(-(-train.max_epochs * rows // train.global_batch_size))
    steps = min(asked)
    return steps, build_schedule(config.scheduler, steps)


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


def _remedies(words: list[str], composed: Composed, survey: Survey) -> list[tuple[list[str], MemoryEstimate]]:
    """Try what makes a run smaller, cheapest first, and return what fits."""
    found: list[tuple[list[str], MemoryEstimate]] = []
    for overrides in _smaller(composed):
        if any(set(fitting) <= set(overrides) for fitting, _ in found):
            continue  # less would do
        try:
            outline = draw_outline(_changed(words, composed, overrides), imagined=True)
        except ConfigError:
            continue
        _, estimate = outline.settle(_shrunk(survey, composed, outline).load)
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


def _shrunk(survey: Survey, composed: Composed, smaller: Outline) -> Survey:
    """Scale what was seen of the data to another limit of rows or number of devices."""
    before = composed.config.hardware.micro_batch_size
    after = smaller.config.hardware.micro_batch_size
    if survey.accumulation is None or before is None or after is None or before == after:
        return survey if survey.accumulation is not None else assume_steps(smaller.config, smaller.machine.world_size)
    micro, share = survey.load.micro, after / before
    scaled = replace(
        micro,
        tokens=round(micro.tokens * share),
        supervised=round(micro.supervised * share),
        token_pairs=micro.token_pairs * share,
    )
    return replace(survey, load=replace(survey.load, micro=scaled, accumulates=True))


def _smaller(composed: Composed) -> list[list[str]]:
    """List overrides, from what costs only time to what trains something else, to more machines."""
    config = composed.config
    rungs = LADDER[LADDER.index(config.hardware.memory) + 1 :] if config.hardware.memory != "auto" else ()
    one_row = [] if config.hardware.micro_batch_size == 1 else ["hardware.micro_batch_size=1"]
    ways = [[f"hardware.memory={rung}"] for rung in rungs] + ([one_row] if one_row else [])
    if composed.choices:
        ways += [["optim=adamw_8bit"], ["optim=adamw_8bit", *one_row], ["optim=paged_adamw_8bit", *one_row]]
        ways += [["recipe=lora"], ["recipe=lora", *one_row], ["recipe=qlora"], ["recipe=qlora", *one_row]]
    devices = config.hardware.devices
    first = 1 if devices == "auto" else devices
    return ways + [[f"hardware.devices={count}"] for count in (2, 4, 8) if count > first]
