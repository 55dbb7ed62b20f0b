"""Which settings mattered: Optuna's PED-ANOVA over the runs, and its limits."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwlit.core.metric import number_or_none
from qwlit.report.comparability import comparable
from qwlit.report.compare import RunComparison, canonical
from qwlit.report.runs import RunRecord

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

FEWEST_RUNS = 4
FEW_RUNS = 10
"""With fewer runs, the shares are only a hint."""
ENDED_EARLY = ("pruned", "diverged")


@dataclass(frozen=True)
class Importance:
    """How much each setting decides whether a run is among the best: shares that sum to 1, the largest first."""

    shares: dict[str, float]
    num_runs: int
    num_best: int
    num_ended_early: int
    num_left_out: int
    together: tuple[tuple[str, ...], ...]
    """Groups of settings that always changed together; `shares` has the first of each group."""

    @property
    def caveats(self) -> list[str]:
        """Say what was computed, from which runs, and how reliable it is."""
        texts = [
            f"Optuna's PED-ANOVA: in which settings the best {self.num_best} of {self.num_runs} runs"
            " differ from the others. Shares sum to 1; they do not say by how much the metric changes."
        ]
        if self.num_runs < FEW_RUNS:
            texts.append(f"{self.num_runs} runs are few: take the shares as a hint.")
        if self.num_ended_early:
            texts.append(f"Pruned and diverged runs ({self.num_ended_early}) count as not among the best.")
        if self.num_left_out:
            texts.append(f"Failed and unfinished runs ({self.num_left_out}) are left out.")
        texts += [f"{', '.join(keys)} always changed together and cannot be separated." for keys in self.together]
        return texts


def importance(comparison: RunComparison) -> Importance | None:
    """Compute the shares. Return None for fewer than four runs, without differences, or if runs are not comparable."""
    ended = [run for run in comparison.runs if run.finished and comparison.value(run) is not None]
    early = [run for run in comparison.runs if not run.finished and run.status in ENDED_EARLY]
    runs = [*ended, *early]
    keys, together = _separable(comparison.searched, runs)
    if len(runs) < FEWEST_RUNS or len(ended) < 2 or not keys or not comparable(runs):
        return None
    # A tenth of many runs, at least 5 (as the evaluator's authors advise), half of few; no run that ended early.
    num_best = min(max(len(runs) // 10, min(5, len(runs) // 2)), len(ended))
    shares = _evaluate(comparison, ended, early, keys, num_best)
    return Importance(shares, len(runs), num_best, len(early), len(comparison.runs) - len(runs), together)


def _separable(keys: Iterable[str], runs: list[RunRecord]) -> tuple[list[str], tuple[tuple[str, ...], ...]]:
    """Return the settings that differ among `runs`, and the groups of settings that changed only together."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for key in keys:
        values = [canonical(run.settings.get(key)) for run in runs]
        pattern = tuple(values.index(value) for value in values)
        if 1 < len(set(values)) < len(runs):
            groups.setdefault(pattern, []).append(key)
        elif len(set(values)) > 1:
            # A setting with another value in each run, as drawn from a range, is never "the same" as a second one.
            groups[(-1, len(groups))] = [key]
    return [group[0] for group in groups.values()], tuple(tuple(g) for g in groups.values() if len(g) > 1)


def _evaluate(
    comparison: RunComparison, ended: list[RunRecord], early: list[RunRecord], keys: list[str], num_best: int
) -> dict[str, float]:
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    values = [float(comparison.value(run) or 0.0) for run in ended]
    # The evaluator only asks which runs are among the best, so runs that ended early get one value worse than all.
    worse = max(values) + 1 if comparison.metric.goal == "minimize" else min(values) - 1
    runs = [*ended, *early]
    scales = {key: distribution([run.settings[key] for run in runs if key in run.settings], key) for key in keys}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction=comparison.metric.goal)
    for run, value in zip(runs, [*values, *[worse] * len(early)], strict=True):
        with_value = [key for key in keys if key in run.settings]
        study.add_trial(
            optuna.create_trial(
                params={key: plain(run.settings[key], scales[key]) for key in with_value},
                distributions={key: scales[key] for key in with_value},
                value=value,
            )
        )
    evaluator = PedAnovaImportanceEvaluator(target_quantile=num_best / len(runs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {key: float(share) for key, share in get_param_importances(study, evaluator=evaluator).items()}


def is_scale(values: list[Any]) -> bool:
    """Whether a setting is a quantity and not one of a few choices."""
    return all(number_or_none(value) is not None for value in values) and len(set(values)) > 2


def is_log(values: list[float], key: str) -> bool:
    """Whether a log scale suits a setting: a learning rate, or values that span more than a factor of ten."""
    return min(values) > 0 and (key.endswith("lr") or max(values) / min(values) > 10)


def distribution(values: list[Any], key: str) -> "BaseDistribution":
    """Return the range or the choices that appear among the runs."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if is_scale(values):
        return FloatDistribution(float(min(values)), float(max(values)), log=is_log(values, key))
    return CategoricalDistribution(sorted({canonical(value) for value in values}))


def plain(value: Any, scale: "BaseDistribution") -> Any:
    """Return a setting in the form that its distribution accepts."""
    from optuna.distributions import FloatDistribution

    return float(value) if isinstance(scale, FloatDistribution) else canonical(value)
