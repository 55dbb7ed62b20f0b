"""What `evaluate` measured of a run: evaluation.json in the run's folder has the newest evaluation."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qwlit.core.metric import number_or_none

LOSS, ACCURACY = "evaluated loss", "evaluated accuracy"


@dataclass(frozen=True)
class Score:
    """A number of an evaluation; of a metric of the answers with its 95 % interval, over temperatures the best one."""

    value: float
    low: float | None = None
    high: float | None = None
    temperature: float | None = None
    """At which the answers were best; None if only one was measured."""

    def text(self) -> str:
        interval = "" if self.low is None or self.high is None else f" ({self.low:.3f}–{self.high:.3f})"
        at = "" if self.temperature is None else f" at {self.temperature:g}"
        return f"{self.value:.3f}{interval}{at}"


def scores(evaluation: Mapping[str, Any]) -> dict[str, Score]:
    """Return the scores by their titles; what is missing or broken is left out."""
    of_all = mapping(mapping(mapping(evaluation, "groups"), "all"), "all")
    numbers = {LOSS: number_or_none(of_all.get("loss")), ACCURACY: number_or_none(of_all.get("accuracy"))}
    found = {title: Score(number) for title, number in numbers.items() if number is not None}
    for mode, metric, points in _curves(evaluation):
        best = max(points, key=lambda point: point["score"], default=None)
        if best is not None:
            low, high, temperature = (number_or_none(best.get(name)) for name in ("low", "high", "temperature"))
            title = f"evaluated {metric}{', thinking' * (mode == 'thinking')}"
            found[title] = Score(best["score"], low, high, temperature if len(points) > 1 else None)
    return found


def question_of(evaluation: Mapping[str, Any]) -> str | None:
    """Return the same text for evaluations of the same rows, number of prompts, modes and temperatures."""
    if not evaluation:
        return None
    asked = [(mode, [point.get("temperature") for point in points]) for mode, _, points in _curves(evaluation)]
    return str((evaluation.get("data"), evaluation.get("prompts"), asked))


def _curves(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, str, list[Mapping[str, Any]]]]:
    """Yield mode, metric, and the points that have a score."""
    quality = mapping(evaluation, "quality")
    for mode in quality:
        for metric, curve in mapping(quality, mode).items():
            points = [point for point in curve if isinstance(point, Mapping)] if isinstance(curve, list) else []
            yield mode, metric, [point for point in points if number_or_none(point.get("score")) is not None]


def mapping(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the object of this name; an empty one where there is none."""
    value = document.get(name)
    return value if isinstance(value, Mapping) else {}
