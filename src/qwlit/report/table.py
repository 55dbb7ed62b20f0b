"""The ledger as columns of text, for the terminal and for the page."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from qwlit.report.compare import Ledger
from qwlit.report.drawing import plain_number
from qwlit.report.runs import Figures, Run

MOST_SETTINGS = 8
"""If more settings differ, each run lists its own changes in one column instead of one column per setting."""
LONG_KEY = 14
UNKNOWN, BEST = "–", "★"
EVENTS = {
    "skip": "{n} skipped",
    "rollback": "{n} rolled back",
    "damaged": "{n} damaged checkpoint{s}",
    "preempted": "preempted {n}x",
    "interrupted": "interrupted {n}x",
    "resumed": "resumed {n}x",
}
"""How the stability column counts an event of events.jsonl, by the event's name."""


@dataclass(frozen=True)
class Column:
    """A title, and for each run a text and whether it is highlighted."""

    title: str
    cells: list[str]
    marked: list[bool]
    kind: Literal["number", "name", "text"] = "number"

    @property
    def title_lines(self) -> list[str]:
        """Return the title as lines. A long dotted key is split after its section, to keep the column narrow."""
        section, dot, name = self.title.rpartition(".")
        return [section + dot, name] if dot and len(self.title) > LONG_KEY else [self.title]


def columns(ledger: Ledger, *, most_listed: int | None = None) -> list[Column]:
    """Return the ledger's columns, without those that have no known value.

    Args:
        most_listed: how many changed settings a run lists if they share one column; None: all.
    """
    names = [
        f"{run.name}\u00a0{BEST}" if run is ledger.best and len(ledger.runs) > 1 else run.name for run in ledger.runs
    ]
    first = Column("run", names, [run is ledger.best for run in ledger.runs], "name")
    status = _column("status", [run.status for run in ledger.runs], "name")
    figures = [_column(title, [text(run) for run in ledger.runs]) for title, text in _figures(ledger)]
    known = [column for column in figures if any(cell != UNKNOWN for cell in column.cells)]
    # The changed settings come next to the metric that they changed.
    ranked = [column for column in known if column.title in (ledger.metric.name, "Δ")]
    rest = [column for column in known if column not in ranked]
    told = _column("stability", [stability(run) for run in ledger.runs], "text")
    settings = _settings(ledger, most_listed)
    changes = [column for column in settings if column.kind == "text"]
    beside = [column for column in settings if column.kind != "text"]
    return [first, status, *ranked, *beside, *rest, *([told] if any(told.cells) else []), *changes]


def _column(title: str, cells: list[str], kind: Literal["number", "name", "text"] = "number") -> Column:
    return Column(title, cells, [False] * len(cells), kind)


def _figures(ledger: Ledger) -> list[tuple[str, Callable[[Run], str]]]:
    def figure(read: Callable[[Figures], Any], text: Callable[[Any], str]) -> Callable[[Run], str]:
        return lambda run: UNKNOWN if (value := read(run.figures)) is None else text(value)

    def loss(read: Callable[[Run], float | None]) -> Callable[[Run], str]:
        places = _places(read(run) for run in ledger.runs)
        return lambda run: show_value(read(run), places)

    shown = [("val/loss", loss(lambda run: run.figures.val_loss))]
    if len(ledger.runs) > 1:
        places = _places(map(ledger.value, ledger.runs))
        delta = ("Δ", lambda run: "baseline" if run is ledger.baseline else show_value(ledger.delta(run), places, "+"))
        first = (ledger.metric.name, loss(ledger.value))
        shown = [first, delta] if ledger.metric.name == "val/loss" else [first, delta, *shown]
    return [
        *shown,
        ("train/loss", loss(lambda run: run.figures.train_loss)),
        ("exact match", figure(lambda f: f.exact_match, "{:.1%}".format)),
        ("steps", figure(lambda f: f.steps, "{:,}".format)),
        ("time", figure(lambda f: f.wall_seconds, _duration)),
        ("tokens/s", figure(lambda f: f.tokens_per_second, "{:,.0f}".format)),
        ("peak GiB", figure(lambda f: f.peak_memory_gib, "{:.2f}".format)),
    ]


def _duration(seconds: float) -> str:
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


def stability(run: Run) -> str:
    """Summarize skips, rollbacks, interruptions and resumes, and why the run stopped early."""
    parts = []
    for event, text in EVENTS.items():
        # Rank 0 may have been killed after it wrote one of the two files and before the other: take the larger count.
        counted = {"skip": "skipped_steps", "rollback": "rollbacks"}.get(event, "")
        summed = run.summary.get(counted)
        number = max(run.count(event), summed if isinstance(summed, int) else 0)
        if event == "preempted" and run.status == "pruned":
            number -= 1  # A sweep preempts a trial to prune it.
        if number > 0:
            parts.append(text.format(n=number, s="s" * (number > 1)))
    if run.status == "stopped":
        step = run.last_step("skip") or run.figures.steps
        parts.append(f"stopped by the guard at step {step}")
    if run.trial and run.trial.reason:
        parts.append(run.trial.reason)
    return ", ".join(parts)


def _settings(ledger: Ledger, most_listed: int | None) -> list[Column]:
    if not ledger.differing:
        return []
    if len(ledger.differing) > MOST_SETTINGS:
        return [_column("other than the baseline", [_others(ledger, run, most_listed) for run in ledger.runs], "text")]
    return [
        Column(
            key,
            [show_setting(run.settings[key]) if key in run.settings else UNKNOWN for run in ledger.runs],
            # In a sweep nearly all settings differ from the baseline, so highlighting them would not help.
            [ledger.sweep is None and not ledger.same(run, key) for run in ledger.runs],
        )
        for key in ledger.differing
    ]


def _others(ledger: Ledger, run: Run, most_listed: int | None) -> str:
    changed = [key for key in ledger.differing if not ledger.same(run, key)]
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
