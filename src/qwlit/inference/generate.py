"""Answer prompts with a trained model."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel

from qwlit.data.samples import Samples
from qwlit.model.attention import generation_attention

BATCH = 50
# Tokens beyond the longest expected answer, so that an answer that does not stop by itself is not an exact match.
SLACK_TOKENS = 16


@dataclass(frozen=True)
class Question:
    """A sample, split before its last answer."""

    sample: int
    prompt: list[int]
    answer: list[int]
    """The expected tokens, including the end-of-turn token."""


@dataclass(frozen=True)
class Answered:
    """A question with the model's answer."""

    question: Question
    tokens: list[int]
    """Generated tokens, up to and including the first end-of-turn token."""

    @property
    def exact(self) -> bool:
        return self.tokens == self.question.answer


def questions(samples: Samples, limit: int) -> list[Question]:
    """Split each of the first `limit` samples before its last run of supervised tokens."""
    asked = []
    for number in range(min(limit, len(samples))):
        ids, mask = samples.sample(number)
        supervised = [int(p) for p in mask.nonzero()[0]]
        start = end = supervised[-1]
        while start - 1 >= 0 and mask[start - 1]:
            start -= 1
        asked.append(Question(number, ids[:start].tolist(), ids[start : end + 1].tolist()))
    return asked


def answer_greedily(
    model: PreTrainedModel, asked: list[Question], *, end_of_turn_id: int, pad_id: int
) -> Iterator[Answered]:
    """Answer each question greedily, until the end-of-turn token.

    Questions are sorted by length, so that a batch needs little padding. The answers come in that order.
    """
    by_length = sorted(asked, key=lambda q: len(q.prompt))
    model.eval()
    with generation_attention(model), torch.inference_mode():
        for first in range(0, len(by_length), BATCH):
            yield from _answer_batch(model, by_length[first : first + BATCH], end_of_turn_id, pad_id)


def _answer_batch(
    model: PreTrainedModel, asked: list[Question], end_of_turn_id: int, pad_id: int
) -> Iterator[Answered]:
    prompts = [torch.tensor(q.prompt, dtype=torch.int64) for q in asked]
    # Pad on the left, so that every answer starts at the same position.
    ids = pad_sequence(prompts, batch_first=True, padding_value=pad_id, padding_side="left")
    mask = pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left")
    out = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        # Not the model folder's own generation settings: they are for sampling.
        generation_config=GenerationConfig(
            max_new_tokens=max(len(q.answer) for q in asked) + SLACK_TOKENS,
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=end_of_turn_id,
            pad_token_id=pad_id,
        ),
    )
    for question, tokens in zip(asked, out[:, ids.shape[1] :].tolist(), strict=True):
        stop = tokens.index(end_of_turn_id) + 1 if end_of_turn_id in tokens else len(tokens)
        yield Answered(question, tokens[:stop])
