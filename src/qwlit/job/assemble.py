"""From a checked configuration to everything a training needs but the weights: machine, tokenizer, data, steps."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from qwlit.config.compose import Composed
from qwlit.config.derive import Derived, derive, limits
from qwlit.config.run import RunConfig
from qwlit.core.console import counting
from qwlit.core.errors import ConfigError, DataError
from qwlit.core.files import resolve_path
from qwlit.data.chat import ChatEncoder
from qwlit.data.rows import NeedsTokenizer
from qwlit.data.splits import DataSplit, load_data
from qwlit.data.step_plan import StepPlan
from qwlit.model.config import AttentionKernel
from qwlit.model.load import check_vocabulary, load_tokenizer, vocabulary_size
from qwlit.model.loss_model import LossModel, build_loss_model
from qwlit.training.machine import Machine, resolve_attention, resolve_machine

# Beside the runs, so that the ranks of every node see it; hidden, so that runs/* are runs.
STORE_FOLDER = ".store"


@dataclass(frozen=True)
class Job:
    """What is known before the weights are loaded."""

    config: RunConfig
    choices: dict[str, str]
    machine: Machine
    attention: AttentionKernel
    tokenizer: PreTrainedTokenizerFast | None
    """None when the rows are tokens already and the model has no tokenizer."""
    encoder: ChatEncoder | None
    data: DataSplit
    plan: StepPlan
    derived: Derived

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id if self.tokenizer else None
        return 0 if pad is None else int(pad)


def assemble(composed: Composed) -> Job:
    """Answer what depends on this machine, tokenize the data, and lay out the run.

    Raises:
        ConfigError, DataError: something that is asked for is not here, or wrong.
    """
    config = composed.config
    machine = resolve_machine(
        config.hardware, config.determinism, profile=composed.choices.get("hardware") or "of this config.yaml"
    )
    attention = resolve_attention(
        config.model.attention,
        machine=machine,
        determinism=config.determinism,
        attention_dropout=config.dropout.attention,
    )
    tokenizer, encoder, data = _data(config)
    plan = StepPlan(
        lengths=data.train.lengths,
        num_supervised=data.train.num_supervised,
        seed=config.seed,
        global_batch_size=config.train.global_batch_size,
        world_size=machine.world_size,
        limits=limits(config),
        packing=config.data.packing,
    )
    for samples in (data.train, data.validation):
        if samples is not None:
            plan.limits.check(samples.lengths)
    derived = derive(config, plan, has_validation=data.validation is not None)
    return Job(config, composed.choices, machine, attention, tokenizer, encoder, data, plan, derived)


def _data(config: RunConfig) -> tuple[PreTrainedTokenizerFast | None, ChatEncoder | None, DataSplit]:
    """Load the tokenizer, which rows that are tokens already can do without, and the data."""
    tokenizer = encoder = missing = None
    try:
        tokenizer = load_tokenizer(config.model)
        check_vocabulary(config.model, tokenizer)
        encoder = ChatEncoder(tokenizer, config.data.template)
    except (ConfigError, DataError) as error:
        missing = error
    try:
        with counting("tokenizing, rows read:") as progress:
            data = load_data(
                config.data,
                encoder=encoder,
                vocab_size=vocabulary_size(config.model),
                cache_root=resolve_path(config.run.root) / STORE_FOLDER,
                progress=progress,
            )
    except NeedsTokenizer:
        raise missing or AssertionError("an encoder was given") from None
    if config.data.exact_match and missing is not None:
        raise ConfigError(
            f"data.exact_match={config.data.exact_match} answers prompts, which needs a tokenizer: {missing}"
        )
    return tokenizer, encoder, data


def load_model(job: Job) -> LossModel:
    """Load or make the weights, with adapter, dropout and attention as set."""
    config = job.config
    return build_loss_model(
        config.model,
        config.adapter,
        config.dropout,
        seed=config.seed,
        attention=job.attention,
        frozen_dtype=job.machine.frozen_dtype,
    )
