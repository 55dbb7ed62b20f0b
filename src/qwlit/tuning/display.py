"""Show a sweep to a person: one line per event, and on a terminal also a bar with the running trials."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn

from qwlit.core.console import can_redraw, progress_bar
from qwlit.core.metric import Metric
from qwlit.tuning.study import AssignedTrial, Outcome
from qwlit.tuning.trial import TrialRun

COLOURS = {"done": "green", "pruned": "yellow", "diverged": "red", "failed": "red"}


class SweepDisplay:
    """Print a line when a trial begins or ends; on a terminal, draw a bar below the lines."""

    def __init__(self, screen: Console, metric: Metric, limit: int) -> None:
        self._screen = screen
        self._metric = metric
        # No refresh thread: the parent forks to start trials, and forking beside threads is unsafe.
        options = {"auto_refresh": False, "transient": True, "disable": not can_redraw(screen)}
        self._bar = progress_bar("trials", MofNCompleteColumn(), screen, **options)
        self._task = self._bar.add_task("", total=limit)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def began(self, assigned: AssignedTrial) -> None:
        self._screen.print(f"trial {assigned.number:>3}  begins    {escape(describe(assigned.parameters))}")

    def ended(self, assigned: AssignedTrial, outcome: Outcome, value: float | None, reason: str | None) -> None:
        measured = "" if value is None else f"{escape(self._metric.name)} {value:.4f}  "
        self._screen.print(
            f"trial {assigned.number:>3}  [{COLOURS[outcome]}]{outcome:<8}[/]  {measured}{escape(reason or '')}"
        )

    def show(self, trials: Sequence[dict[str, Any]] | None, running: Mapping[int, TrialRun]) -> None:
        """Refresh the bar.

        Args:
            trials: the trials of sweep.json if one of them has begun or ended, else None.
            running: number of a slot → the trial in it.
        """
        if trials is not None:
            ended = sum(trial["state"] != "running" for trial in trials)
            self._bar.update(self._task, completed=ended)
        steps = "  ".join(f"{trial.assigned.number}: step {trial.step}" for _, trial in sorted(running.items()))
        self._bar.update(self._task, description=steps)
        self._bar.refresh()


def describe(parameters: dict[str, Any]) -> str:
    """Return a trial's parameters as one line."""
    return "  ".join(
        f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}" for name, value in parameters.items()
    )
