"""report.html: the comparison of runs as one file that loads nothing else. A reader can open, mail and keep it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from qwlit.core.errors import ConfigError, printable
from qwlit.core.files import resolve_path, write_text_atomic
from qwlit.report.comparability import comparable
from qwlit.report.compare import RunComparison
from qwlit.report.curves import draw_curves, panels
from qwlit.report.diagnosis import diagnose
from qwlit.report.drawing import BLACK, GREY, PALETTE
from qwlit.report.importance import FEWEST_RUNS, Importance
from qwlit.report.measured import against_plan, data_in_words, draw_lengths, lengths
from qwlit.report.repeats import find_repeats, judge, table_of
from qwlit.report.runs import RunRecord
from qwlit.report.single import describe
from qwlit.report.slices import draw_slices
from qwlit.report.table import columns

FILE = "report.html"
TEMPLATE = "qwlit:report.html.jinja"


def write_page(
    comparison: RunComparison, warnings: list[str], importance: Importance | None, path: Path, *, refresh: int = 0
) -> None:
    """Write the page atomically: a reader never sees half of it.

    Args:
        refresh: a browser loads the page again after so many seconds; 0: never.

    Raises:
        ConfigError: `path` cannot be written.
    """
    text = build_page(comparison, warnings, importance, refresh=refresh)
    try:
        write_text_atomic(path, text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}; name another place with page=FILE") from None


def build_page(
    comparison: RunComparison, warnings: list[str], importance: Importance | None, *, refresh: int = 0
) -> str:
    """Fill the template. Every text of others stays text, whatever it contains: by autoescape, and by `printable`."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resolve_path(TEMPLATE).read_text(encoding="utf-8"))
    several = comparison.sweep.name if comparison.sweep else comparison.home.absolute().name or "runs"
    colours = _colours(comparison)
    drawings = [(panel, draw_curves(panel, comparison.runs, colours)) for panel in panels(comparison.runs)]
    searched = len(comparison.runs) >= FEWEST_RUNS and bool(comparison.searched) and comparable(comparison.runs)
    groups = find_repeats(comparison)
    page = template.render(
        title=several if len(comparison.runs) > 1 else comparison.runs[0].name,
        headline=headline(comparison),
        refresh=refresh,
        warnings=warnings,
        columns=columns(comparison),
        diagnoses=[(run, diagnose(run)) for run in comparison.runs if run.exists],
        runs=comparison.runs,
        colours=colours,
        grey=GREY,
        metric=comparison.metric.name,
        repeats=table_of(groups) if groups else None,
        verdicts=[verdict.text() for verdict in judge(comparison, groups)],
        importance=importance if searched else None,
        slices=_slices(comparison, importance) if searched else None,
        curves=[(panel, svg) for panel, svg in drawings if svg],
        **_of_one_run(comparison.runs),
    )
    return printable(f"{page}\n")


def _of_one_run(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Return what the page shows only for a single run; None for several."""
    shown = {
        "details": describe,
        "plan": against_plan,
        "data": data_in_words,
        "lengths": lengths,
        "drawn": draw_lengths,
    }
    return {name: show(runs[0]) if len(runs) == 1 else None for name, show in shown.items()}


def headline(comparison: RunComparison) -> str:
    """Say in one line how many runs there are, and which one is best by which metric."""
    count, metric = len(comparison.runs), comparison.metric.name
    what = f"{count} {'trial' if comparison.sweep else 'run'}{'s' * (count > 1)}"
    if count == 1:
        return f"{what}, {comparison.runs[0].status}"
    best = f"best by {metric}: {comparison.best.name}" if comparison.best else f"no run has {metric} yet"
    return f"{what}; {best}; differences (Δ) are to {comparison.baseline.name}"


def _colours(comparison: RunComparison) -> dict[str, str]:
    """Give the baseline black and each of the best runs a colour. The others are grey."""
    if len(comparison.runs) == 1:
        return {comparison.runs[0].name: PALETTE[0]}
    others = [run.name for run in comparison.runs if run is not comparison.baseline]
    colours = {comparison.baseline.name: BLACK, **dict(zip(others, PALETTE, strict=False))}
    return {run.name: colours[run.name] for run in comparison.runs if run.name in colours}


def _slices(comparison: RunComparison, importance: Importance | None) -> str | None:
    """Draw the metric against each searched setting, the most important setting first."""
    keys = [*importance.shares] if importance else []
    return draw_slices(comparison, keys + [key for key in comparison.searched if key not in keys])
