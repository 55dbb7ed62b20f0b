"""Answer prompts with a trained model."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
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
    width = max(len(q.prompt) for q in asked)
    ids = torch.full((len(asked), width), pad_id)
    for row, question in enumerate(asked):
        ids[row, width - len(question.prompt) :] = torch.tensor(question.prompt)
    mask = torch.stack([torch.arange(width) >= width - len(q.prompt) for q in asked]).long()
    out = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        # Not the checkpoint's own generation settings: they are for sampling.
        generation_config=GenerationConfig(
            max_new_tokens=max(len(q.answer) for q in asked) + SLACK_TOKENS,
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=end_of_turn_id,
            pad_token_id=pad_id,
        ),
    )
    for question, tokens in zip(asked, out[:, width:].tolist(), strict=True):
        stop = tokens.index(end_of_turn_id) + 1 if end_of_turn_id in tokens else len(tokens)
        yield Answered(question, tokens[:stop])
