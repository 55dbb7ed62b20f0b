"""From a checked configuration to everything a training needs but the weights: machine, tokenizer, data, steps."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from qwlit.config.compose import Composed
from qwlit.config.run import RunConfig
from qwlit.core.console import console
from qwlit.data.encoding import RowEncoder
from qwlit.data.splits import DataSplit, split_data
from qwlit.data.step_plan import StepPlan
from qwlit.model.config import Execution
from qwlit.model.loss_model import LossModel, build_loss_model
from qwlit.planning.batch_statistics import survey_steps
from qwlit.planning.corpus import open_corpus
from qwlit.planning.facts import facts_of
from qwlit.planning.memory.estimate import MemoryEstimate
from qwlit.planning.outline import draw_outline
from qwlit.planning.preflight import Finding, find, refuse
from qwlit.planning.steps import Derived, derive, plan_steps
from qwlit.training.machine import Machine


@dataclass(frozen=True)
class Job:
    """What is known before the weights are loaded."""

    config: RunConfig
    choices: dict[str, str]
    machine: Machine
    execution: Execution
    memory: MemoryEstimate
    tokenizer: PreTrainedTokenizerFast | None
    """None when the rows are tokens already and the model has no tokenizer."""
    encoder: RowEncoder
    data: DataSplit
    plan: StepPlan
    derived: Derived
    findings: list[Finding]

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id if self.tokenizer else None
        return 0 if pad is None else int(pad)


def assemble(composed: Composed) -> Job:
    """Answer what depends on this machine, tokenize the data, and lay out the run.

    Raises:
        ConfigError, DataError: something that is asked for is not here, or wrong; or a preflight rule refuses the run.
    """
    config = composed.config
    outline = draw_outline(composed)
    # What the settings alone condemn need not wait for the tokenizer either.
    refuse(find(facts_of(outline)))
    corpus = open_corpus(config, console())
    data = split_data(config.data, corpus.training, corpus.validation)
    plan = plan_steps(config, data, outline.machine.world_size)
    for samples in (data.train, data.validation):
        if samples is not None:
            plan.limits.check(samples)
    derived = derive(config, plan, has_validation=data.validation is not None)
    outline, memory = outline.settle(survey_steps(plan, derived.total_steps).load)
    findings = find(facts_of(outline, memory, derived.schedule, data, corpus.tokenizer))
    refuse(findings)
    return Job(
        config=config,
        choices=composed.choices,
        machine=outline.machine,
        execution=outline.execution,
        memory=memory,
        tokenizer=corpus.tokenizer,
        encoder=corpus.encoder,
        data=data,
        plan=plan,
        derived=derived,
        findings=findings,
    )


def load_model(job: Job, *, leave_empty: bool = False) -> LossModel:
    """Load or make the weights, with adapter, dropout and attention as set; `leave_empty` to fill them when sharded."""
    config = job.config
    return build_loss_model(
        config.model,
        config.adapter,
        config.dropout,
        config.freeze,
        job.execution,
        seed=config.seed,
        leave_empty=leave_empty,
    )
