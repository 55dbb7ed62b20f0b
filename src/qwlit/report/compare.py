"""Compare runs: order them by their metric, find the settings in which they differ, and choose the baseline."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwlit.config.run import NOT_IN_RECIPE, RECIPE_SECTIONS
from qwlit.core.errors import ConfigError, nearest
from qwlit.core.files import resolve_path
from qwlit.core.metric import Metric
from qwlit.report.find import SweepFolder, find_runs
from qwlit.report.runs import VAL_LOSS, RunRecord, read_runs


@dataclass(frozen=True)
class RunComparison:
    """Runs, the best first, with the baseline and the settings in which they differ."""

    runs: tuple[RunRecord, ...]
    baseline: RunRecord
    metric: Metric
    sweep: SweepFolder | None
    """The sweep, if all runs are trials of one sweep."""
    differing: tuple[str, ...]
    """Settings that have several values among the runs."""

    def value(self, run: RunRecord) -> float | None:
        return run.value(self.metric)

    def delta(self, run: RunRecord) -> float | None:
        """Return the run's value minus the baseline's."""
        value, reference = self.value(run), self.value(self.baseline)
        return None if value is None or reference is None else value - reference

    @property
    def best(self) -> RunRecord | None:
        return self.runs[0] if self.value(self.runs[0]) is not None else None

    @property
    def searched(self) -> tuple[str, ...]:
        """Return the settings that the sweep varied; without a sweep, the differing recipe settings except the seed."""
        if self.sweep is None:
            return tuple(key for key in self.differing if _in_recipe(key) and key != "seed")
        drawn = {key for run in self.runs if run.trial for key in run.trial.params}
        return tuple(key for key in self.differing if key in drawn)

    def same(self, run: RunRecord, key: str) -> bool:
        """Whether a setting has the baseline's value. A setting that an older run does not have counts as the same."""
        settings, reference = run.settings, self.baseline.settings
        return key not in settings or key not in reference or canonical(settings[key]) == canonical(reference[key])

    @property
    def home(self) -> Path:
        """Return the folder for the page: the run's, the sweep's, or the common parent of all runs."""
        if self.sweep is not None:
            return self.sweep.path
        if len(self.runs) == 1:
            return self.runs[0].path
        return Path(os.path.commonpath([run.path.absolute().parent for run in self.runs]))


def build_comparison(paths: list[str], baseline: str | None) -> RunComparison:
    """Read the runs at `paths` and order them.

    Args:
        paths: run folders, sweep folders and globs.
        baseline: name of a listed run, or a run folder. None: the first run named, or the best trial of a sweep.

    Raises:
        ConfigError: a path matches no run, or `baseline` matches none or several.
    """
    runs = read_runs(find_runs(paths))
    chosen = next((run for run in runs if run.name == baseline), None)
    if baseline is not None and chosen is None:
        folder = _folder_of(baseline, runs).resolve()
        # A folder that is not among the runs joins them.
        runs = read_runs(find_runs([*paths, baseline]))
        chosen = next(run for run in runs if run.path.resolve() == folder)
    metric = _metric(runs)
    ordered = sorted(runs, key=lambda run: _rank(run, metric))
    if chosen is None:
        chosen = _default_baseline(runs[0], ordered)
    sweeps = {run.trial.sweep if run.trial else None for run in runs}
    return RunComparison(
        tuple(ordered), chosen, metric, next(iter(sweeps)) if len(sweeps) == 1 else None, _differing(runs)
    )


def _folder_of(baseline: str, runs: list[RunRecord]) -> Path:
    """Return the one run folder at the path `baseline`."""
    if not resolve_path(baseline).is_dir():
        names = [run.name for run in runs]
        listed = nearest(baseline, names) or f" Listed are {', '.join(names[:5])}{' …' * (len(names) > 5)}."
        raise ConfigError(f"baseline={baseline}: no listed run has this name.{listed}")
    found = find_runs([baseline])
    if len(found) > 1:
        raise ConfigError(f"baseline={baseline} matches {len(found)} runs; name one of them")
    return found[0].path


def _metric(runs: Iterable[RunRecord]) -> Metric:
    """Return the metric of the runs' sweeps if they share one, else the validation loss."""
    metrics = {run.trial.sweep.metric if run.trial else VAL_LOSS for run in runs}
    return metrics.pop() if len(metrics) == 1 else VAL_LOSS


def _rank(run: RunRecord, metric: Metric) -> tuple[bool, bool, float, str]:
    """Sort by the metric. Unfinished trials come last: their value was measured at an earlier step."""
    value = run.value(metric)
    signed = 0.0 if value is None else value if metric.goal == "minimize" else -value
    return run.trial is not None and not run.finished, value is None, signed, run.name


def _default_baseline(first: RunRecord, ordered: list[RunRecord]) -> RunRecord:
    if first.trial is None:
        return first
    return next(run for run in ordered if run.trial and run.trial.sweep == first.trial.sweep)


def _differing(runs: Sequence[RunRecord]) -> tuple[str, ...]:
    """Return the settings with several values. A run without the key does not count.

    Settings that a sweep drew come first, then the other settings of the recipe.
    """
    values: dict[str, set[str]] = {}
    for run in runs:
        for key, value in run.settings.items():
            values.setdefault(key, set()).add(canonical(value))
    differing = [key for key, seen in values.items() if len(seen) > 1]
    drawn = {key for run in runs if run.trial for key in run.trial.params}
    return tuple(sorted(differing, key=lambda key: (key not in drawn, not _in_recipe(key))))


def _in_recipe(key: str) -> bool:
    """Whether a setting belongs to the recipe. Here `data.path` does, because it names the data."""
    return key.partition(".")[0] in RECIPE_SECTIONS and key not in NOT_IN_RECIPE - {"data.path"}


def canonical(value: Any) -> str:
    """Return equal texts for equal settings: 1 and 1.0 are equal."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
