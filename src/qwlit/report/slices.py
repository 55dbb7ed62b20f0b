"""The metric against each searched setting: which values are good, and whether the best is at the edge of the range."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qwlit.core.metric import number_or_none
from qwlit.report.compare import RunComparison
from qwlit.report.drawing import ALARM, figure, needs_log_axis, plain_number, set_log, to_svg
from qwlit.report.importance import is_log, is_scale
from qwlit.report.runs import RunRecord
from qwlit.report.table import show_setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS, MOST_PANELS = 3, 9
LONGEST_LABEL = 16


def draw_slices(comparison: RunComparison, keys: Sequence[str]) -> str | None:
    """Draw one panel per setting as SVG. Return None if no run has a value."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    keys = keys[:MOST_PANELS]
    order = _order(comparison)
    values = [value for run in order if (value := comparison.value(run)) is not None]
    if not values or not keys:
        return None
    columns = 2 if len(keys) == 4 else min(COLUMNS, len(keys))
    rows = math.ceil(len(keys) / columns)
    with figure("slices", 3.6 * columns + 0.8, 3.0 * rows) as picture:
        panels = picture.subplots(rows, columns, sharey=True, squeeze=False)
        colours = ScalarMappable(Normalize(1, max(len(order), 2)), "viridis_r")
        for axes, key in zip(panels.flat, keys, strict=False):
            _draw(axes, key, comparison, order, colours)
        for axes in list(panels.flat)[len(keys) :]:
            axes.set_visible(False)
        if needs_log_axis(values):
            set_log(panels[0, 0], "y")
        for row in panels:
            row[0].set_ylabel(comparison.metric.name)
        _add_legends(picture, panels, colours, order)
        return to_svg(picture)


def _order(comparison: RunComparison) -> list[RunRecord]:
    """Return the runs in the order in which they were made, as far as it is known."""

    def when(run: RunRecord) -> tuple[float, str]:
        began = run.events[0].get("time") if run.events else None
        return float(run.trial.number) if run.trial else number_or_none(began) or 0.0, run.name

    return sorted(comparison.runs, key=when)


def _draw(axes: "Axes", key: str, comparison: RunComparison, order: list[RunRecord], colours: Any) -> None:
    with_key = [(position, run) for position, run in enumerate(order, 1) if key in run.settings]
    settings = [run.settings[key] for _, run in with_key]
    xs = _x_positions(axes, key, settings)
    best = comparison.best
    for (position, run), x in zip(with_key, xs, strict=True):
        value, colour = comparison.value(run), colours.to_rgba(position)
        if value is None:
            # No value: a cross on the upper or lower edge, whichever means worse.
            edge = 1.0 if comparison.metric.goal == "minimize" else 0.0
            axes.plot(x, edge, "x", color=ALARM, transform=axes.get_xaxis_transform(), clip_on=False, markersize=5)
        elif run.finished:
            axes.plot(x, value, "o", color=colour, markersize=5, markeredgecolor="white", markeredgewidth=0.4)
        else:
            axes.plot(x, value, "v", color=colour, markerfacecolor="none", markersize=5)
        if run is best and value is not None:
            axes.plot(x, value, "o", color="#000000", markerfacecolor="none", markersize=10)
    axes.set_xlabel(key)


def _x_positions(axes: "Axes", key: str, settings: list[Any]) -> list[float]:
    """Set up the x axis for the setting, and return the position of each value on it."""
    from matplotlib.ticker import MaxNLocator

    if is_scale(settings):
        numbers = [float(value) for value in settings]
        if is_log(numbers, key):
            axes.set_xlim(min(numbers) / 1.15, max(numbers) * 1.15)
            set_log(axes, "x")
        else:
            axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
            axes.xaxis.set_major_formatter(lambda value, _: plain_number(value))
        return numbers
    labels = [show_setting(value) for value in settings]
    names = sorted(set(labels))
    shown = [name if len(name) <= LONGEST_LABEL else f"{name[: LONGEST_LABEL - 1]}…" for name in names]
    axes.set_xticks(range(len(names)), shown, rotation=20 * (len(names) > 3))
    axes.set_xlim(-0.5, len(names) - 0.5)
    return [float(names.index(label)) for label in labels]


def _add_legends(picture: "Figure", panels: Any, colours: Any, order: list[RunRecord]) -> None:
    """Add a bar that explains the colours, and a legend that explains the markers."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    bar = picture.colorbar(colours, ax=panels, label="order of the runs", pad=0.01, fraction=0.03, aspect=40)
    bar.locator = MaxNLocator(integer=True, nbins=6)
    bar.outline.set_visible(False)
    style: dict[str, Any] = {"linestyle": "", "color": "#555555", "markersize": 5}
    kinds = [Line2D([], [], marker="o", label="finished", **style)]
    if any(not run.finished for run in order):
        kinds.append(Line2D([], [], marker="v", markerfacecolor="none", label="unfinished (pruned, killed …)", **style))
        kinds.append(Line2D([], [], marker="x", label="no value (failed, diverged …)", **style | {"color": ALARM}))
    kinds.append(Line2D([], [], marker="o", markerfacecolor="none", label="best", **style | {"markersize": 9}))
    picture.legend(handles=kinds, loc="outside upper left", ncols=len(kinds))
