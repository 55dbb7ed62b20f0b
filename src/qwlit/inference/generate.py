"""Answer prompts with a trained model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel

from qwlit.data.prompts import EVAL_BATCH_SIZE, EVAL_BATCH_TOKENS
from qwlit.data.samples import Samples
from qwlit.model.attention import generation_attention

# The model may generate this many tokens more than the longest expected answer has, so that an answer that does not end
# is no exact match.
EXTRA_TOKENS = 16
GREEDY = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
"""Without these transformers takes the values of the model's folder, and warns that greedy answers ignore them."""


@dataclass(frozen=True)
class EvalPrompt:
    """A validation sample, split before its last answer."""

    sample: int
    tokens: list[int]
    answer: list[int]
    """The expected tokens, including the end-of-turn token."""


@dataclass(frozen=True)
class EvalAnswer:
    """The model's answer to a prompt."""

    prompt: EvalPrompt
    tokens: list[int]
    """Generated tokens, up to and including the first end-of-turn token."""

    @property
    def exact(self) -> bool:
        return self.tokens == self.prompt.answer


def eval_prompts(samples: Samples, limit: int, *, end_of_turn_id: int) -> list[EvalPrompt]:
    """Split each of the first `limit` samples before its last run of supervised tokens.

    A template may supervise a line break after the end-of-turn token; no answer is generated so far.
    """
    prompts = []
    for index in range(min(limit, len(samples))):
        ids, mask = samples.read([index])
        supervised = [int(p) for p in mask.nonzero()[0]]
        start = end = supervised[-1]
        while start - 1 >= 0 and mask[start - 1]:
            start -= 1
        while end > start and ids[end] != end_of_turn_id:
            end -= 1
        prompts.append(EvalPrompt(index, ids[:start].tolist(), ids[start : end + 1].tolist()))
    return prompts


def answer_greedily(
    model: PreTrainedModel, prompts: list[EvalPrompt], *, end_of_turn_id: int, pad_id: int
) -> Iterator[EvalAnswer]:
    """Answer each prompt greedily, until the end-of-turn token.

    Prompts are sorted by length, so that a batch needs little padding. The answers of the longest come first.
    """
    by_length = sorted(prompts, key=lambda p: len(p.tokens))
    model.eval()
    with generation_attention(model), torch.inference_mode():
        while by_length:
            size = max(1, min(EVAL_BATCH_SIZE, EVAL_BATCH_TOKENS // len(by_length[-1].tokens)))
            batch, by_length = by_length[-size:], by_length[:-size]
            yield from _answer_batch(model, batch, end_of_turn_id, pad_id)


def left_padded(prompts: Sequence[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask of a batch, (B, T) int64 each: every answer starts at the same position."""
    rows = [torch.tensor(ids, dtype=torch.int64) for ids in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    return ids.to(device), mask.to(device)


def _answer_batch(
    model: PreTrainedModel, prompts: list[EvalPrompt], end_of_turn_id: int, pad_id: int
) -> Iterator[EvalAnswer]:
    ids, mask = left_padded([prompt.tokens for prompt in prompts], pad_id, model.device)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        # Not the model folder's own generation settings: they are for sampling.
        generation_config=GenerationConfig(
            max_new_tokens=max(len(p.answer) for p in prompts) + EXTRA_TOKENS,
            **GREEDY,
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=end_of_turn_id,
            pad_token_id=pad_id,
        ),
    )
    for prompt, tokens in zip(prompts, out[:, ids.shape[1] :].tolist(), strict=True):
        stop = tokens.index(end_of_turn_id) + 1 if end_of_turn_id in tokens else len(tokens)
        yield EvalAnswer(prompt, tokens[:stop])
