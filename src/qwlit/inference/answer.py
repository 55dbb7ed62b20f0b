"""Answer prompts with a trained model. transformers generates; this module encodes, watches and stops.

Shapes: B prompts, T positions, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from qwlit.config.settings import GenerationSettings
from qwlit.core.errors import ConfigError, DataError, GuardStop
from qwlit.data.conversation import END_THINK, THINK
from qwlit.data.prompts import Prompt
from qwlit.data.rows import RowError
from qwlit.inference.generate import GREEDY, left_padded
from qwlit.inference.trained_model import NONFINITE_REMEDY, QUESTION, TrainedModel
from qwlit.model.attention import generation_attention

LOOP_TOKENS, LOOP_DISTINCT = 48, 6
"""An answer whose last so many tokens are so few distinct ones repeats itself (assumption)."""


@dataclass(frozen=True)
class Answer:
    """What the model wrote."""

    tokens: list[int]
    """Without the end token."""
    text: str
    """The answer, without its thinking and its end."""
    thinking: str
    """What the model wrote inside of <think>; empty if it did not think."""
    ended: bool
    """Whether the model ended the answer; False: `max_new_tokens` or the end of its positions did."""

    @property
    def repeats_itself(self) -> bool:
        tail = self.tokens[-LOOP_TOKENS:]
        return not self.ended and len(tail) == LOOP_TOKENS and len(set(tail)) <= LOOP_DISTINCT


def encode_prompt(model: TrainedModel, prompt: Prompt, settings: GenerationSettings) -> list[int]:
    """Return the prompt's token ids: in the chat template, or of the plain text.

    Raises:
        DataError: the template cannot express the conversation, or the prompt is longer than the model can read.
    """
    try:
        "".join(message.content for message in prompt.conversation.messages).encode()
    except UnicodeEncodeError:
        raise DataError(f"{prompt.origin or 'prompt'} is not UTF-8; type or save it in that encoding") from None
    if settings.chat and model.chat is not None:
        try:
            pieces = model.chat.template.render_prompt(prompt.conversation, thinking=settings.thinking)
        except RowError as error:
            raise DataError(f"{prompt.origin or 'prompt'}: {error}") from None
        (encoded,) = model.chat.encode_batch([pieces])
        ids = encoded.input_ids
    else:
        (ids,) = model.text.encode(["\n".join(message.content for message in prompt.conversation.messages)])
    longest = model.most_positions
    if not 0 < len(ids) < longest:
        raise DataError(
            f"{prompt.origin or 'prompt'} has {len(ids):,} tokens; the model reads 1 to {longest - 1:,}"
            " (max_position_embeddings)"
        )
    return ids


def has_thinking_switch(model: TrainedModel) -> bool:
    """Whether the chat template makes another prompt for an answer with thinking than for one without."""
    if model.chat is None:
        return False
    template = model.chat.template
    try:
        return template.render_prompt(QUESTION, thinking=True) != template.render_prompt(QUESTION, thinking=False)
    except RowError:
        return True  # a template that refuses this question says so at the user's


def answers(
    model: TrainedModel,
    prompts: Sequence[Prompt],
    settings: GenerationSettings,
    *,
    streamer: BaseStreamer | None = None,
) -> Iterator[Answer]:
    """Answer the prompts in their order, `settings.batch_size` at a time.

    Sampling uses torch's global generator; seed it before.

    Args:
        streamer: gets the tokens of a single prompt as they are generated.

    Raises:
        DataError: see `encode_prompt`.
        GuardStop: the model's distribution of the next token is not finite.
        ConfigError: the device has too little memory for a batch.
    """
    # All before the first answer: a prompt that is too long shows at once.
    encoded = [encode_prompt(model, prompt, settings) for prompt in prompts]
    for first in range(0, len(prompts), settings.batch_size):
        batch = encoded[first : first + settings.batch_size]
        for prompt, tokens in zip(batch, generate(model, batch, settings, streamer=streamer), strict=True):
            yield _answer(model, prompt, tokens, settings)


def generate(
    model: TrainedModel,
    prompts: Sequence[list[int]],
    settings: GenerationSettings,
    *,
    streamer: BaseStreamer | None = None,
) -> list[list[int]]:
    """Return what the model generates after each prompt, with the end token where it ends.

    An answer also ends where the positions of the model do.
    """
    lm = model.causal_lm
    ids, mask = left_padded(prompts, model.pad_id, lm.device)
    rooms = [model.most_positions - len(prompt) for prompt in prompts]
    try:
        with generation_attention(lm), torch.inference_mode(), model.precision():
            out: Tensor = lm.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=_generation_config(model, settings, min(settings.max_new_tokens, max(rooms))),
                logits_processor=LogitsProcessorList([_RefuseNonfinite(model.origin)]),
                streamer=streamer,
                # Only with stop texts does transformers need, and allow, a tokenizer.
                **({"tokenizer": model.tokenizer} if settings.stop else {}),
            )
    except torch.OutOfMemoryError:
        raise ConfigError(
            f"too little device memory for {len(prompts)} prompts and {settings.max_new_tokens} new tokens; set"
            " generation.batch_size=1, or a smaller generation.max_new_tokens"
        ) from None
    ends = set(model.end_ids)
    generated = []
    for tokens, room in zip(out[:, ids.shape[1] :].tolist(), rooms, strict=True):
        end = next((index for index, token in enumerate(tokens) if token in ends), len(tokens) - 1)
        generated.append(tokens[: min(end + 1, room)])
    return generated


def _generation_config(model: TrainedModel, settings: GenerationSettings, max_new_tokens: int) -> GenerationConfig:
    """Return transformers' settings; the model has none of its own, see `trained_model`."""
    sampling = settings.temperature > 0
    sampled = {
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "min_p": settings.min_p or None,
    }
    return GenerationConfig(
        **(sampled if sampling else GREEDY),
        do_sample=sampling,
        num_beams=1,
        repetition_penalty=settings.repetition_penalty,
        max_new_tokens=max_new_tokens,
        stop_strings=list(settings.stop) or None,
        eos_token_id=model.end_ids or None,
        pad_token_id=model.pad_id,
        use_cache=True,
    )


class _RefuseNonfinite(LogitsProcessor):
    """Ends the generation where sampling would fail: torch.multinomial asserts on the device, and CUDA is lost then."""

    def __init__(self, origin: str) -> None:
        self._origin = origin

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # transformers cuts the distribution with -inf only after this. It waits for the device at each token as well.
        if not scores.isfinite().all():
            raise GuardStop(
                f"{self._origin}: the logits of the next token are not finite, so no token can be sampled."
                f" {NONFINITE_REMEDY}"
            )
        return scores


def _answer(model: TrainedModel, prompt: list[int], tokens: list[int], settings: GenerationSettings) -> Answer:
    ended = bool(tokens) and tokens[-1] in model.end_ids
    written = tokens[:-1] if ended else tokens
    text = model.tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    for stop in settings.stop:
        if stop in text:
            text, ended = text[: text.index(stop)], True
    thinking, text = split_thinking(THINK + text if opens_thinking(model.tokenizer, prompt) else text)
    return Answer(written, text, thinking, ended)


def opens_thinking(tokenizer: PreTrainedTokenizerFast, prompt: list[int]) -> bool:
    """Whether the prompt ends with <think>, as the templates of models that always think write it."""
    return bool(tokenizer.decode(prompt[-8:]).rstrip().endswith(THINK))


def remarks(answer: Answer, settings: GenerationSettings) -> list[str]:
    """Return in words what is wrong with how an answer ends."""
    if answer.repeats_itself:
        return [
            "the answer repeats itself: raise generation.temperature or generation.repetition_penalty; a fine-tuned"
            " model that does so was trained too long or with too high a learning rate"
        ]
    if not answer.ended and len(answer.tokens) < settings.max_new_tokens:
        return ["the answer was cut where the model's positions end (max_position_embeddings)"]
    if not answer.ended:
        return [f"the answer was cut after generation.max_new_tokens={settings.max_new_tokens}"]
    return []


def split_thinking(text: str) -> tuple[str, str]:
    """Return what is inside of the <think> block at the beginning, also of one that does not end, and what follows."""
    if not text.lstrip().startswith(THINK):
        return "", text
    thinking, _, answer = text.lstrip().removeprefix(THINK).partition(END_THINK)
    return thinking.strip("\n"), answer.lstrip("\n")
