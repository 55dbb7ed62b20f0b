"""Curves of runs over their steps. The drawings contain no run names: the page has the legend."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median
from typing import TYPE_CHECKING, Literal

from qwlit.core.metric import set_loss_key, set_of_key
from qwlit.report.drawing import (
    ALARM,
    BLACK,
    GREY,
    LOG_SPREAD,
    PALETTE,
    figure,
    needs_log_axis,
    plain_number,
    set_log,
    to_svg,
)
from qwlit.report.runs import RunRecord, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_POINTS = 300
"""Curves with more points are thinned: a screen does not show more."""
FEW_POINTS = 12
"""Curves with at most this many points have a marker at each."""
MOST_GROUPS = 4


@dataclass(frozen=True)
class Panel:
    """The drawing of one quantity, with one line per run."""

    key: str
    title: str
    unit: str
    peaks: bool = False
    """Thinning keeps the maximum of each stretch of steps, not the mean, so that a single spike stays visible."""
    log_axis_by: Literal["values", "spikes", "peaks", "nothing"] = "values"
    """Which values decide whether the axis is logarithmic. A gradient norm near 0 or the low learning rates at the end
    of a schedule must not cause a logarithmic axis."""
    with_events: bool = False


PANELS = (
    Panel("val/loss", "Validation loss", "nats per supervised token"),
    Panel("train/loss", "Training loss", "nats per supervised token", with_events=True),
    Panel(
        "optim/grad_norm", "Gradient norm, before clipping", "norm", peaks=True, log_axis_by="spikes", with_events=True
    ),
    Panel("optim/lr", "Learning rate", "learning rate", peaks=True, log_axis_by="peaks", with_events=True),
    Panel("throughput/tokens_per_second", "Throughput", "tokens per second", log_axis_by="nothing"),
)


def panels(runs: Sequence[RunRecord]) -> list[Panel]:
    """Return the panels of the runs' quantities: PANELS, and one for each named validation set."""
    names = sorted({name for run in runs for key in run.series if (name := set_of_key(key))})
    sets = [Panel(set_loss_key(name), f"Validation loss, {name}", PANELS[0].unit) for name in names]
    return [PANELS[0], *sets, *PANELS[1:], *(_group_panels(runs[0]) if len(runs) == 1 else [])]


def _group_panels(run: RunRecord) -> list[Panel]:
    """Return the panels of the parameter groups, of at most `MOST_GROUPS` where layers have groups of their own."""
    kinds = (("grad_norm", "Gradient norm", "norm"), ("update_ratio", "Change of the weights", "share of their norm"))
    found = []
    for kind, title, unit in kinds:
        keys = [key for key in run.series if key.startswith(f"optim/{kind}/")][:MOST_GROUPS]
        names = [key.split("/", 2)[2] for key in keys]
        found += [Panel(k, f"{title}, {n}", unit, peaks=True) for k, n in zip(keys, names, strict=True)]
    return found


MARKS = {
    "skip": ("skipped step", ALARM),
    "alarm": ("alarm of the guard", PALETTE[4]),
    "rollback": ("went back to here", PALETTE[3]),
    "cut": ("went back to here, at half the learning rate", PALETTE[5]),
    "resumed": ("resumed", PALETTE[2]),
    "stopped": ("stopped by the guard", BLACK),
}
"""Label and colour of the vertical lines: events by their name, and what a decision to go back tells."""


def draw_curves(panel: Panel, runs: Sequence[RunRecord], colours: Mapping[str, str]) -> str | None:
    """Draw a panel as SVG. Return None if no run has the quantity.

    Args:
        runs: the best first; it is drawn on top.
        colours: run name → colour; other runs are grey.
    """
    drawn = [run for run in runs if run.series.get(panel.key)]
    if not drawn:
        return None
    with figure(panel.key, 6.4, 3.4) as picture:
        axes = picture.add_subplot(xlabel="step", ylabel=panel.unit)
        lines = [run.series[panel.key] for run in drawn]
        for run, line in reversed([*zip(drawn, lines, strict=True)]):
            _draw(axes, thin(line, peaks=panel.peaks), colours.get(run.name))
        if panel.with_events and len(runs) == 1:
            undone = [series[panel.key] for series in runs[0].undone if panel.key in series]
            for line in undone:
                _draw(axes, thin(line, peaks=panel.peaks), None)
            lines += undone
        _format_axes(axes, panel, [[value for _, value in line] for line in lines])
        if panel.with_events and len(runs) == 1:
            _mark_events(axes, runs[0])
        return to_svg(picture)


def thin(series: Series, *, peaks: bool = False) -> Series:
    """Return about `MOST_POINTS` points at most: the mean of each stretch of steps, or its maximum."""
    if len(series) <= MOST_POINTS:
        return series
    first = series[0][0]
    width = (series[-1][0] - first + 1) / MOST_POINTS
    thinned = []
    for _, stretch in groupby(series, lambda point: int((point[0] - first) / width)):
        steps, values = zip(*stretch, strict=True)
        thinned.append((steps[-1], max(values) if peaks else sum(values) / len(values)))
    return thinned


def _draw(axes: "Axes", points: Series, colour: str | None) -> None:
    steps, values = zip(*points, strict=True)
    axes.plot(
        steps,
        values,
        color=colour or GREY,
        linewidth=1.5 if colour else 0.7,
        marker="o" if len(points) <= FEW_POINTS else "",
        markersize=3.5 if colour else 2.0,
        zorder=3 if colour else 2,
    )


def _format_axes(axes: "Axes", panel: Panel, values: list[list[float]]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=(1, 2, 2.5, 5, 10)))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    peaks, together = [max(each) for each in values], [value for each in values for value in each]
    if panel.log_axis_by == "peaks" and needs_log_axis(peaks):
        axes.set_ylim(bottom=min(peaks) / LOG_SPREAD)
        set_log(axes, "y")
    elif panel.log_axis_by == "spikes" and needs_log_axis(together, above=median(together)):
        axes.set_ylim(bottom=median(together) / LOG_SPREAD)
        set_log(axes, "y")
    elif panel.log_axis_by == "values" and needs_log_axis(together):
        set_log(axes, "y")
    else:
        if panel.log_axis_by != "values":
            axes.set_ylim(0, 1.05 * max(together) or 1)
        axes.yaxis.set_major_formatter(lambda value, _: plain_number(value))


def _mark_events(axes: "Axes", run: RunRecord) -> None:
    """Draw a vertical line at each step of `MARKS`."""
    for mark, steps in _marks(run).items():
        label, colour = MARKS[mark]
        for index, step in enumerate(steps):
            axes.axvline(step, color=colour, linewidth=1.3, linestyle="--", label=label if index == 0 else None)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper right")


def _marks(run: RunRecord) -> dict[str, list[int]]:
    """Return the steps of each mark."""
    found = {mark: {event["step"] for event in run.events if event["event"] == mark} for mark in MARKS}
    for decision in run.decisions:
        found["alarm"].add(decision.get("from_step"))
        found["cut" if decision.get("cause") == "divergence" else "rollback"].add(decision.get("to_step"))
    found["rollback"] -= found["cut"]
    return {mark: sorted(step for step in steps if isinstance(step, int)) for mark, steps in found.items()}
