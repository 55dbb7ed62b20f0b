"""Collect the facts that the preflight rules read."""

from transformers import PreTrainedTokenizerFast

from qwlit.data.samples import count_tokens, longest
from qwlit.data.splits import DataSplit
from qwlit.model.presets import context_length
from qwlit.optim.schedules import Schedule
from qwlit.planning.batch_statistics import assume_batches
from qwlit.planning.memory.estimate import MemoryEstimate
from qwlit.planning.memory.state import MicroShape
from qwlit.planning.memory.whole_run import bytes_by_phase
from qwlit.planning.preflight.rules import DataFacts, PreflightFacts, TokenizerFacts
from qwlit.planning.saves import plan_saves
from qwlit.planning.setup import Setup


def facts_of(
    setup: Setup,
    micro: MicroShape | None = None,
    memory: MemoryEstimate | None = None,
    schedule: Schedule | None = None,
    data: DataSplit | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> PreflightFacts:
    """Collect the facts. An argument is None if it is not available; rules that need it then find nothing.

    Args:
        micro: the micro-batch that takes the most memory.
        memory: what a step takes with it.
    """
    if micro is None or memory is None:
        # Without data, the rules that can refuse read only weights, gradients and moments; batches do not matter.
        micro = assume_batches(setup.config, setup.machine.world_size).largest
        _, memory = setup.fit_memory(micro)
    config, machine = setup.config, setup.machine
    saves = plan_saves(setup.groups, config.optim, machine, memory)
    copy = saves.device_copy_bytes(machine)
    return PreflightFacts(
        config=config,
        typed=setup.composed.typed,
        machine=machine,
        execution=setup.execution,
        compile_obstacle=setup.compile_obstacle,
        num_parameters=setup.num_parameters,
        memory=memory,
        bytes_by_phase=bytes_by_phase(config, setup.model, machine, setup.execution, memory, micro, copy=copy),
        saves=saves,
        schedule=schedule,
        highest_lr=max((group.lr for group in setup.groups), default=0.0),
        data=None if data is None else _data_facts(data),
        tokenizer=None if tokenizer is None else _tokenizer_facts(tokenizer),
        vocab_size=int(setup.model.config.vocab_size),
        context_length=context_length(setup.model.config),
    )


def _data_facts(data: DataSplit) -> DataFacts:
    tokens, supervised = count_tokens(data.train)
    totals = data.totals
    return DataFacts(
        supervised_share=supervised / tokens,
        cut_share=(totals["too_long"] + totals["truncated"]) / max(1, totals["read"]),
        longest=max(longest(samples) for samples in (data.train, data.validation) if samples),
        has_validation=data.validation is not None,
    )


def _tokenizer_facts(tokenizer: PreTrainedTokenizerFast) -> TokenizerFacts:
    return TokenizerFacts(tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer))
