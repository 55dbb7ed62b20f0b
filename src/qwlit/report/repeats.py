"""Runs with the same settings and other seeds: mean and confidence interval of each metric, and what differs."""

from collections.abc import Sequence
from dataclasses import dataclass

from qwlit.report.comparability import data_fingerprints, settings_of
from qwlit.report.compare import RunComparison, canonical
from qwlit.report.runs import RunRecord
from qwlit.report.single import TextTable
from qwlit.report.student import CONFIDENCE, Estimate, estimate, samples_needed, welch
from qwlit.report.table import show_setting

TRAIN_LOSS, EXACT_MATCH = "train/loss", "exact_match"
ALL = "all runs"


@dataclass(frozen=True)
class Repeats:
    """Runs that differ in their seed alone."""

    settings: str
    """Those in which the group differs from other groups."""
    runs: list[RunRecord]
    """One for each seed."""
    estimates: dict[str, Estimate]
    """Of each metric that all runs have: the compared metric's best value, the last train/loss, and the last value of
    every other one of the validation."""
    lacking: dict[str, int]
    """Of each other metric, how many runs have no finite value of it; others do."""


@dataclass(frozen=True)
class Verdict:
    """Whether a metric of two groups differs by more than their seeds do."""

    first: str
    second: str
    metric: str
    difference: float
    """Mean of the second minus mean of the first."""
    p_value: float
    """Of Welch's test."""
    seeds_needed: int | None
    """How many runs of each group would show such a difference; None if it is more than 10,000, or no difference."""

    @property
    def differs(self) -> bool:
        return self.p_value < 1 - CONFIDENCE

    def text(self) -> str:
        amount = f"{self.difference:+.3g} in {self.metric} (Welch's test, p = {self.p_value:.2g})"
        if self.differs:
            return f"{self.second} against {self.first}: {amount}, more than the seeds explain"
        needed = f"; {self.seeds_needed:,} seeds of each would show such a difference" if self.seeds_needed else ""
        return f"{self.second} against {self.first}: {amount}, not more than the seeds explain{needed}"


def find_repeats(comparison: RunComparison) -> list[Repeats]:
    """Return the groups of two or more seeds, that of the baseline first."""
    groups: dict[tuple[str, ...], dict[str, RunRecord]] = {}
    for run in comparison.runs:
        if run.finished and run.settings:
            seeds = groups.setdefault(settings_of(run, comparison, ("seed",)), {})
            # The same seed again is the same run again.
            seeds.setdefault(canonical(run.settings.get("seed")), run)
    chosen = [[*seeds.values()] for seeds in groups.values() if len(seeds) > 1]
    chosen.sort(key=lambda runs: comparison.baseline not in runs)
    keys = [
        key
        for key in comparison.differing
        if key != "seed" and len({canonical(runs[0].settings.get(key)) for runs in chosen}) > 1
    ]
    return [_repeats(_name(runs[0], keys), runs, comparison) for runs in chosen]


def _name(run: RunRecord, keys: Sequence[str]) -> str:
    return " ".join(f"{key}={show_setting(run.settings.get(key))}" for key in keys) or ALL


def _repeats(settings: str, runs: list[RunRecord], comparison: RunComparison) -> Repeats:
    values = {comparison.metric.name: [comparison.value(run) for run in runs]}
    values[TRAIN_LOSS] = [run.results.train_loss for run in runs]
    values.setdefault(EXACT_MATCH, [run.results.exact_match for run in runs])
    for key in (key for run in runs for key in run.series if key.startswith("val/")):
        values.setdefault(key, [run.series[key][-1][1] if key in run.series else None for run in runs])
    known = {metric: [value for value in found if value is not None] for metric, found in values.items()}
    estimates = {metric: estimate(found) for metric, found in known.items() if len(found) == len(runs)}
    lacking = {metric: len(runs) - len(found) for metric, found in known.items() if 0 < len(found) < len(runs)}
    return Repeats(settings, runs, estimates, lacking)


def judge(comparison: RunComparison, groups: list[Repeats]) -> list[Verdict]:
    """Compare each group with the first one: in the compared metric, or without validation in the last train/loss."""
    verdicts = []
    for group in groups[1:]:
        first = groups[0]
        if comparison.metric.name in first.lacking | group.lacking:
            # Runs without a value, such as diverged ones, are no smaller sample.
            continue
        same_data = data_fingerprints(first.runs[0])[1] == data_fingerprints(group.runs[0])[1]
        metrics = [comparison.metric.name, TRAIN_LOSS] if same_data else [TRAIN_LOSS]
        metric = next((name for name in metrics if name in first.estimates and name in group.estimates), None)
        if metric is not None:
            a, b = first.estimates[metric], group.estimates[metric]
            needed = samples_needed(a, b) if a.mean != b.mean else None
            verdict = Verdict(first.settings, group.settings, metric, b.mean - a.mean, welch(a, b), needed)
            verdicts.append(verdict)
    return verdicts


def table_of(groups: list[Repeats]) -> TextTable:
    """Return a line for each group and metric."""
    lines = [
        [group.settings, str(found.count), metric, *_numbers(found)]
        for group in groups
        for metric, found in group.estimates.items()
    ]
    lines += [
        [group.settings, str(len(group.runs)), metric, f"no finite value in {count}", "", ""]
        for group in groups
        for metric, count in group.lacking.items()
    ]
    note = "95 % is the confidence interval of the mean, from Student's t distribution"
    return TextTable(["settings", "seeds", "metric", "mean", "95 %", "deviation"], lines, note)


def _numbers(found: Estimate) -> list[str]:
    return [f"{found.mean:.5g}", f"± {found.half_width:.2g}", f"{found.deviation:.2g}"]
