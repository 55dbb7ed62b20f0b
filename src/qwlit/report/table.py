"""The comparison of runs as columns of text, for the terminal and for the page."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from qwlit.core.metric import number_or_none
from qwlit.report.compare import RunComparison
from qwlit.report.drawing import plain_number
from qwlit.report.evaluated import ACCURACY, LOSS, Score, scores
from qwlit.report.runs import RunRecord

MOST_SETTINGS = 8
"""If more settings differ, each run lists its own changes in one column instead of one column per setting."""
LONG_KEY = 14
LONGEST = 1e10
"""Seconds that are written as days and hours; Python's `timedelta` overflows somewhere above."""
UNKNOWN, BEST = "–", "★"
EVENTS = {
    "skip": "{n} skipped",
    "rollback": "{n} rollback{s}",
    "damaged": "{n} damaged checkpoint{s}",
    "preempted": "preempted {n}x",
    "interrupted": "interrupted {n}x",
    "resumed": "resumed {n}x",
}
"""How the stability column counts an event of events.jsonl, by the event's name."""


@dataclass(frozen=True)
class Column:
    """A title, and a text for each run."""

    title: str
    cells: list[str]
    kind: Literal["number", "name", "text"] = "number"
    marked: Sequence[int] = ()
    """Positions of the highlighted cells."""

    @property
    def title_lines(self) -> list[str]:
        """Return the title as lines. A long dotted key is split after its section, to keep the column narrow."""
        section, dot, name = self.title.rpartition("." if "." in self.title else " ")
        return [section + dot.strip(), name] if dot and len(self.title) > LONG_KEY else [self.title]


def columns(comparison: RunComparison, *, most_listed: int | None = None) -> list[Column]:
    """Return the comparison's columns, without those that have no known value.

    Args:
        most_listed: how many changed settings a run lists if they share one column; None: all.
    """
    names = [run.name for run in comparison.runs]
    if comparison.best and len(names) > 1:
        names[0] += f"\u00a0{BEST}"
    results = [column for column in _results(comparison) if any(cell != UNKNOWN for cell in column.cells)]
    # The changed settings come next to the metric that they changed.
    ranking = [column for column in results if column.title in (comparison.metric.name, "Δ")]
    settings = _settings(comparison, most_listed)
    stability_cells = [stability(run) for run in comparison.runs]
    return [
        Column("run", names, "name", marked=[0] if comparison.best else []),
        Column("status", [run.status for run in comparison.runs], "name"),
        *ranking,
        *(column for column in settings if column.kind != "text"),
        *(column for column in results if column not in ranking),
        *([Column("stability", stability_cells, "text")] if any(stability_cells) else []),
        *(column for column in settings if column.kind == "text"),
    ]


def _results(comparison: RunComparison) -> list[Column]:
    """Return a column for the metric, for the difference to the baseline, and for each result of the runs."""
    results = [run.results for run in comparison.runs]
    losses = [_losses("val/loss", [result.val_loss for result in results])]
    if len(comparison.runs) > 1:
        values = [comparison.value(run) for run in comparison.runs]
        places = _places(values)
        deltas = [show_value(comparison.delta(run), places, "+") for run in comparison.runs]
        deltas[comparison.runs.index(comparison.baseline)] = "baseline"
        others = [] if comparison.metric.name == "val/loss" else losses
        losses = [_losses(comparison.metric.name, values), Column("Δ", deltas), *others]
    return [
        *losses,
        *_evaluated(comparison.runs),
        _column("time", [result.wall_seconds for result in results], duration),
        _losses("train/loss", [result.train_loss for result in results]),
        _column("exact match", [result.exact_match for result in results], "{:.1%}".format),
        _column("steps", [result.steps for result in results], "{:,}".format),
        _column("tokens/s", [result.tokens_per_second for result in results], "{:,.0f}".format),
        _column("peak GiB", [result.peak_memory_gib for result in results], "{:.2f}".format),
    ]


def _evaluated(runs: Sequence[RunRecord]) -> list[Column]:
    """Return a column for each number that `evaluate` measured of any run."""
    found = [scores(run.evaluation) for run in runs]
    titles = dict.fromkeys(title for each in found for title in each)
    special = {LOSS: lambda score: show_value(score.value), ACCURACY: lambda score: f"{score.value:.2%}"}
    return [
        Column(title, [special.get(title, Score.text)(each[title]) if title in each else UNKNOWN for each in found])
        for title in titles
    ]


def _column(title: str, values: Sequence[float | None], text: Callable[[float], str]) -> Column:
    return Column(title, [UNKNOWN if value is None else text(value) for value in values])


def _losses(title: str, values: Sequence[float | None]) -> Column:
    places = _places(values)
    return Column(title, [show_value(value, places) for value in values])


def duration(seconds: float) -> str:
    """Format a time, days and hours where it is long."""
    if seconds > LONGEST:
        return f"{seconds:.3g} s"
    return f"{seconds:.1f} s" if seconds < 10 else str(timedelta(seconds=round(seconds)))


def _places(values: Iterable[float | None]) -> int:
    """Return how many decimal places show four digits of the smallest value, at least four and at most eight."""
    small = min((abs(value) for value in values if value), default=1.0)
    return min(8, max(4, 3 - math.floor(math.log10(small))))


def show_value(value: float | None, places: int = 4, sign: str = "") -> str:
    """Format a loss, or the difference of two losses."""
    if value is None:
        return UNKNOWN
    return f"{value:{sign}.{places}f}" if abs(value) < 1e4 else f"{value:{sign}.3g}"


def stability(run: RunRecord) -> str:
    """Summarize skipped steps, damaged checkpoints, interruptions and resumes, and why the run stopped early."""
    parts = []
    for event, text in EVENTS.items():
        # Rank 0 may have been killed after it wrote one of the two files and before the other: take the larger count.
        count = max(run.count(event), _skipped_steps(run) if event == "skip" else 0)
        if event == "preempted" and run.status == "pruned":
            count -= 1  # A sweep preempts a trial to prune it.
        if count > 0:
            parts.append(text.format(n=count, s="s" * (count > 1)))
    if run.status == "stopped":
        step = run.last_step("stopped") or run.last_step("skip") or run.results.steps
        parts.append(f"stopped by the guard at step {step}")
    if run.trial and run.trial.reason:
        parts.append(run.trial.reason)
    return ", ".join(parts)


def _skipped_steps(run: RunRecord) -> int:
    return int(number_or_none(run.summary.get("skipped_steps")) or 0)


def _settings(comparison: RunComparison, most_listed: int | None) -> list[Column]:
    if not comparison.differing:
        return []
    if len(comparison.differing) > MOST_SETTINGS:
        changes = [_changes(comparison, run, most_listed) for run in comparison.runs]
        return [Column("other than the baseline", changes, "text")]
    return [
        Column(
            key,
            [show_setting(run.settings[key]) if key in run.settings else UNKNOWN for run in comparison.runs],
            # In a sweep nearly all settings differ from the baseline, so highlighting them would not help.
            marked=[
                n for n, run in enumerate(comparison.runs) if comparison.sweep is None and not comparison.same(run, key)
            ],
        )
        for key in comparison.differing
    ]


def _changes(comparison: RunComparison, run: RunRecord, most_listed: int | None) -> str:
    """List the settings that are other than the baseline's."""
    changed = [key for key in comparison.differing if not comparison.same(run, key)]
    listed = [f"{key}={show_setting(run.settings[key])}" for key in changed[:most_listed]]
    more = len(changed) - len(listed)
    return " ".join(listed) + (f" and {more} more" if more else "")


def show_setting(value: Any) -> str:
    """Format a setting as a user types it, numbers with four digits."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        # Small numbers as 2e-4, the usual form of learning rates; large ones as 10000.
        return plain_number(value) if abs(value) < 1e-3 else f"{value:.{10 if value.is_integer() else 4}g}"
    if isinstance(value, list):
        return f"[{','.join(map(show_setting, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{show_setting(item)}' for key, item in value.items())}}}"
    return str(value)
