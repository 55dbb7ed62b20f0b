"""The prompts of the probe."""

from typing import TYPE_CHECKING

from qwlit.data.samples import Samples
from qwlit.data.tokenizer import END_OF_TEXT
from qwlit.inference.generate import eval_prompts
from qwlit.training.resilience.guard import Guard
from qwlit.training.resilience.probe import Probe
from qwlit.training.telemetry import Telemetry

if TYPE_CHECKING:
    from qwlit.run.training_run import TrainingRun

PROMPTS = 3
SHORTEST_PROMPT, BEGINNING = 4, 16
"""A sample whose answer follows fewer tokens than the first number is a text; its prompt is so many first tokens."""


def build_probe(run: "TrainingRun", guard: Guard, telemetry: Telemetry) -> Probe | None:
    """Build the probe; None where the settings want none."""
    every_steps = run.config.guard.probe_every_steps
    if every_steps is None:
        return None
    tokenized, split = run.data.tokenized, run.data.split
    chat, plain = tokenized.encoder.chat, tokenized.encoder.tokenizer
    ends = {chat.end_of_turn_id} if chat is not None else set()
    if plain is not None and END_OF_TEXT in plain.control_ids:
        ends.add(plain.control_ids[END_OF_TEXT])
    return Probe(
        guard,
        run.folder,
        telemetry=telemetry,
        every_steps=every_steps,
        total_steps=run.data.steps.milestones.total_steps,
        prompts=probe_prompts(split.train if split.validation is None else split.validation),
        end_ids=ends,
        decode=None if tokenized.tokenizer is None else tokenized.tokenizer.decode,
    )


def probe_prompts(samples: Samples) -> list[list[int]]:
    """Return the token ids before the answers of the first samples; of texts the beginnings."""
    prompts = []
    for prompt in eval_prompts(samples, PROMPTS, end_of_turn_id=-1):
        if len(prompt.tokens) < SHORTEST_PROMPT:
            ids, _ = samples.read([prompt.sample])
            prompts.append(ids[:BEGINNING].tolist())
        else:
            prompts.append(prompt.tokens)
    return prompts
