"""Evaluate trained models on rows: the loss, the quality of the answers, and how models differ on the same rows."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape

from qwlit.config.settings import GenerationSettings
from qwlit.core.console import showing_progress
from qwlit.core.errors import ConfigError
from qwlit.data.samples import Samples
from qwlit.data.splits import split_data
from qwlit.data.store import REASONS_NAMED, quarantine_reasons
from qwlit.inference.bootstrap import RESAMPLES, bootstrap_interval
from qwlit.inference.sample_scores import Result, SampleScores, score_samples
from qwlit.inference.scorers import Scorer
from qwlit.inference.temperature import Quality, prompts_of, temperature_curve
from qwlit.inference.trained_model import TrainedModel
from qwlit.planning.tokenized_data import load_tokenized_data

SIGNIFICANT = 0.05
"""A model is called better only below this p-value (the usual level)."""


@dataclass(frozen=True)
class Question:
    """What to measure beside the loss."""

    scorers: dict[str, Scorer]
    most_prompts: int
    repeats: int
    temperatures: list[float]
    """Of the curve; empty: the temperature of the settings."""
    modes: dict[str, GenerationSettings]
    """Settings by their name, thinking or non_thinking; empty: those of the model's settings."""
    typed_path: bool
    """Whether the user named rows with data.path: then all of them are evaluated, else the run's validation rows."""

    def count_answers(self, settings: GenerationSettings) -> int:
        """Return how many answers each prompt gets; greedy ones are the same every time."""
        return sum(self.repeats if t else 1 for t in self.temperatures or [settings.temperature])


@dataclass(frozen=True)
class Evaluation:
    """The results of one model."""

    groups: dict[str, dict[str, Result]]
    """all, file, script → name → result."""
    scores: SampleScores
    contents: list[str]
    """Fingerprints of the tokenized rows: models with equal ones are compared sample by sample."""
    num_prompts: int = 0
    quality: dict[str, dict[str, list[Quality]]] = field(default_factory=dict)
    """Mode → metric → quality at each temperature."""

    def as_json(self) -> dict[str, Any]:
        groups = {group: {name: asdict(r) for name, r in results.items()} for group, results in self.groups.items()}
        curves = {
            mode: {metric: [asdict(point) for point in curve] for metric, curve in metrics.items()}
            for mode, metrics in self.quality.items()
        }
        return {"groups": groups, "data": self.contents, "prompts": self.num_prompts, "quality": curves}


def evaluate(model: TrainedModel, question: Question, screen: Console) -> Evaluation:
    """Measure a model on the rows of `data.path` if the user typed it, else on the run's validation rows.

    Raises:
        ConfigError, DataError: there are no such rows, or the model cannot answer them.
    """
    samples, path, contents = _rows(model, question, screen)
    with showing_progress("evaluating", screen) as show:
        scores = score_samples(model, samples, show)
    evaluation = Evaluation(scores.groups(), scores, contents)
    if not question.scorers:
        return evaluation
    prompts = prompts_of(model.config.data, path, samples, question.most_prompts)
    own = model.config.generation
    modes = question.modes or {"thinking" if own.thinking else "non_thinking": own}
    quality: dict[str, dict[str, list[Quality]]] = {}
    with showing_progress("answering", screen) as show:
        done, in_all = 0, len(prompts) * sum(map(question.count_answers, modes.values()))

        def count() -> None:
            nonlocal done
            done += 1
            show(done, in_all, f"{done:,} of {in_all:,} answers", finished=done == in_all)

        for mode, settings in modes.items():
            temperatures = question.temperatures or [settings.temperature]
            quality[mode] = temperature_curve(
                model, prompts, settings, question.scorers, temperatures, repeats=question.repeats, on_answer=count
            )
    return replace(evaluation, num_prompts=len(prompts), quality=quality)


def _rows(model: TrainedModel, question: Question, screen: Console) -> tuple[Samples, Any, list[str]]:
    """Return the samples, the setting with their path, and the fingerprints of their stores."""
    data = model.config.data
    if not question.typed_path and model.setup.composed.choices:
        raise ConfigError("a model folder has no validation rows; name rows with data.path=FILE")
    data = replace(data, exact_match=0, drop_duplicates=False)
    if question.typed_path:
        data = replace(data, val_path=None, val_fraction=0.0)
    config = replace(model.config, data=data)
    tokenized = load_tokenized_data(config, screen)
    split = split_data(data, tokenized.training, tokenized.validation)
    left_out = [f"left out: {reason}" for reason in quarantine_reasons(split.stores)[:REASONS_NAMED]]
    for note in (*left_out, *split.remarks):
        screen.print(f"  [yellow]note[/]  {escape(note)}")
    if too_long := split.totals["too_long"]:
        screen.print(f"  [yellow]note[/]  {too_long:,} rows are left out: more than {data.max_seq_len:,} tokens")
    if question.typed_path:
        return split.train, data.path, split.contents["data.path"]
    if split.validation is None:
        raise ConfigError("the settings have no validation rows; name rows with data.path=FILE")
    held_out = data.val_path is None
    contents = [found for name, own in split.contents.items() if (name == "data.path") == held_out for found in own]
    return split.validation, data.path if held_out else data.val_path, contents


@dataclass(frozen=True)
class Difference:
    """How two models differ on the same samples: second minus first, of the loss in nats per supervised token."""

    first: str
    second: str
    loss: float
    low: float
    high: float
    """A 95 % interval: percentile bootstrap over the samples."""
    p_value: float
    """Of a permutation test that swaps the two models sample by sample: how often chance alone gives such a mean."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def describe(self) -> str:
        verdict = "no clear difference"
        # Of few samples, the interval alone is too narrow.
        if (self.low > 0 or self.high < 0) and self.p_value < SIGNIFICANT:
            verdict = f"{self.first if self.loss > 0 else self.second} is better"
        return (
            f"{self.second} against {self.first}: loss {self.loss:+.4f} (95 %: {self.low:+.4f} to {self.high:+.4f},"
            f" p = {self.p_value:.3g}): {verdict}"
        )


def compare(evaluations: Mapping[str, Evaluation]) -> list[Difference]:
    """Compare every two models sample by sample.

    Raises:
        ConfigError: two models have other tokens for the rows.
    """
    found = []
    for (first, one), (second, other) in combinations(evaluations.items(), 2):
        if one.contents != other.contents:
            raise ConfigError(
                f"{first} and {second} have other tokens for these rows, so their losses per token do not compare;"
                " compare bits/byte"
            )
        found.append(Difference(first, second, *_paired(one.scores, other.scores)))
    return found


def _paired(first: SampleScores, second: SampleScores) -> tuple[float, float, float, float]:
    """Return the difference of the loss per token, its interval and its p-value. The draws are the same every time."""
    generator = np.random.default_rng(0)
    difference, tokens = second.loss_sums - first.loss_sums, first.num_tokens
    mean, as_large = difference.sum() / tokens.sum(), 0
    for _ in range(RESAMPLES):
        swapped = (difference * generator.choice((-1.0, 1.0), len(tokens))).sum() / tokens.sum()
        as_large += abs(swapped) >= abs(mean) * (1 - 1e-12)
    # Counting the real pairing keeps the test valid (Phipson and Smyth, 2010, doi:10.2202/1544-6115.1585).
    return float(mean), *bootstrap_interval(difference, tokens), (as_large + 1) / (RESAMPLES + 1)
