"""Quality of the answers, by a scorer, at one temperature or over a grid of them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from qwlit.config.settings import GenerationSettings
from qwlit.core.errors import DataError
from qwlit.data.config import DataConfig, parts_of
from qwlit.data.prompts import Prompt, read_prompts
from qwlit.data.samples import Samples
from qwlit.inference.answer import answers
from qwlit.inference.bootstrap import bootstrap_interval
from qwlit.inference.scorers import Scorer
from qwlit.inference.trained_model import TrainedModel


@dataclass(frozen=True)
class Quality:
    """The mean score of the answers to all prompts, over the repeats with different seeds."""

    temperature: float
    score: float
    low: float
    high: float
    """A 95 % interval: percentile bootstrap over the prompts, the repeats of a prompt together."""
    cut: float
    """Share of answers that did not end by themselves."""


def prompts_of(config: DataConfig, path: Any, samples: Samples, most: int) -> list[Prompt]:
    """Return the first prompts whose rows are among the samples and have an answer.

    Raises:
        DataError: no row has a prompt and an answer.
    """
    origins = {samples.origin(index) for index in range(len(samples))}
    found = []
    for part in parts_of(path):
        for prompt in read_prompts(part.path, columns=config.columns, origins=origins):
            if prompt.expected is not None:
                found.append(prompt)
            if len(found) == most:
                return found
    if not found:
        raise DataError("no row has a prompt and its answer, so there is nothing to compare answers with")
    return found


def measure_quality(
    model: TrainedModel,
    prompts: Sequence[Prompt],
    settings: GenerationSettings,
    scorers: dict[str, Scorer],
    *,
    repeats: int,
    on_answer: Callable[[], None],
) -> dict[str, Quality]:
    """Answer all prompts `repeats` times with the seeds seed, seed + 1, … and score the answers."""
    scores = {name: np.zeros((repeats, len(prompts))) for name in scorers}
    num_cut = 0
    for repeat in range(repeats):
        torch.manual_seed(model.config.seed + repeat)
        for index, (prompt, answer) in enumerate(zip(prompts, answers(model, prompts, settings), strict=True)):
            num_cut += not answer.ended
            for name, score in scorers.items():
                scores[name][repeat, index] = score(answer.text, prompt.expected or "")
            on_answer()
    cut = num_cut / (repeats * len(prompts))
    return {name: _quality(settings.temperature, values.mean(0), cut) for name, values in scores.items()}


def _quality(temperature: float, by_prompt: Any, cut: float) -> Quality:
    """Args: by_prompt: (prompts,) mean scores over the repeats."""
    return Quality(temperature, float(by_prompt.mean()), *bootstrap_interval(by_prompt, np.ones(len(by_prompt))), cut)


def temperature_curve(
    model: TrainedModel,
    prompts: Sequence[Prompt],
    settings: GenerationSettings,
    scorers: dict[str, Scorer],
    temperatures: Iterable[float],
    *,
    repeats: int,
    on_answer: Callable[[], None],
) -> dict[str, list[Quality]]:
    """Measure the quality at each temperature; greedy answers (0) are the same every time and need one repeat."""
    curve: dict[str, list[Quality]] = {name: [] for name in scorers}
    for temperature in temperatures:
        at = replace(settings, temperature=temperature)
        times = repeats if temperature else 1
        measured = measure_quality(model, prompts, at, scorers, repeats=times, on_answer=on_answer)
        for name, quality in measured.items():
            curve[name].append(quality)
    return curve
