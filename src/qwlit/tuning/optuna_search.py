"""A sweep on this machine: Optuna draws, every trial is a process and an ordinary run, nothing needs an account."""

import signal
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from qwlit.config.compose import Composed
from qwlit.config.run import RunConfig
from qwlit.core.console import console
from qwlit.core.errors import ConfigError, GuardStop, Preempted, nearest
from qwlit.core.files import resolve_path
from qwlit.training.resilience.preemption import answering_signals
from qwlit.training.resilience.requeue_limit import counting_requeues
from qwlit.training.tracking.run_folder import RunFolder
from qwlit.tuning.display import SweepDisplay
from qwlit.tuning.record import header, refuse_other_sweep, steps_made, write_record
from qwlit.tuning.slots import allocate_slots
from qwlit.tuning.space import Space, format_overrides, build_space, check_space, grid_points
from qwlit.tuning.study import Outcome, Study
from qwlit.tuning.sweep_file import Metric, Sweep
from qwlit.tuning.trial import TrialRun

POLL_SECONDS = 0.25
# A fault that every trial has: so many of the first ones could not even begin.
HOPELESS = 3
METRICS = (
    "val/loss",
    "val/accuracy",
    "train/loss",
    "exact_match",
    "throughput/tokens_per_second",
    "memory/peak_gib",
    "wall_seconds",
)
"""Columns of metrics.jsonl and entries of summary.json that can be searched for."""


def run_local(sweep: Sweep, words: list[str], *, trials: int | None, jobs: int | None) -> Path:
    """Run the sweep until all its trials have ended, or the rest of an interrupted one; return its folder.

    Args:
        words: overrides that every trial has, after those of the sweep's own command.
        trials: how many in all, over every machine and restart.
        jobs: how many side by side.

    Raises:
        ConfigError: the sweep cannot be run as it is written.
    """
    fixed = [*sweep.words, "logger=none", *words]
    space = build_space(sweep)
    composed = check_space(sweep, fixed)
    config = composed.config
    folder = sweep_folder(sweep, composed, words)
    check_metric(sweep, config)
    if config.hardware.num_nodes > 1:
        raise ConfigError("hardware.num_nodes: a trial of a local sweep runs on one machine; use backend=wandb")
    slots = allocate_slots(jobs, config.hardware.devices, option="jobs")
    limit = number_of_trials(sweep, space, trials)
    head = header(folder.name, sweep, config, fixed)
    if folder.exists():
        refuse_other_sweep(folder, head)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.root: {folder} cannot be written: {error.strerror}") from None
    study = Study(folder, sweep, space, trials=limit, seed=config.seed)
    try:
        most = config.slurm.max_requeues_in_place
        with counting_requeues(RunFolder(folder), lambda: steps_made(folder), most), answering_signals():
            _Search(study, sweep.document.metric, folder, head, slots, limit).run()
    finally:
        study.close()
    return folder


def sweep_folder(sweep: Sweep, composed: Composed, words: list[str]) -> Path:
    """Return run.root/NAME: the sweep's own name, or the run.name that was typed."""
    named = any(word.partition("=")[0].lstrip("+") == "run.name" for word in words)
    return resolve_path(composed.config.run.root) / (str(composed.config.run.name) if named else sweep.name)


def check_metric(sweep: Sweep, config: RunConfig) -> None:
    """Refuse a search for what no trial will measure.

    Raises:
        ConfigError: naming the setting.
    """
    data, name = config.data, sweep.document.metric.name
    if name not in METRICS:
        raise ConfigError(
            f"{sweep.path}: metric.name={name} is nothing that a run measures.{nearest(name, METRICS)}"
            f" Known: {', '.join(METRICS)}"
        )
    if name == "exact_match" and not data.exact_match:
        raise ConfigError("exact_match is what the sweep looks for; set data.exact_match to a number of rows")
    if not name.startswith("val"):
        return
    if data.val_path is None and not data.val_fraction:
        raise ConfigError(f"{name} is what the sweep looks for; set data.val_path or data.val_fraction")
    if not config.validation.each_epoch and config.validation.every_steps is None:
        raise ConfigError(f"{name} is what the sweep looks for; set validation.each_epoch=true or every_steps")


def number_of_trials(sweep: Sweep, space: Space, trials: int | None) -> int:
    """Return how many trials there are in all.

    Raises:
        ConfigError: nobody says, and the method has no end of its own.
    """
    asked = trials or sweep.document.run_cap
    if sweep.document.method == "grid":
        points = 1
        for values in grid_points(space).values():
            points *= len(values)
        return min(points, asked or points)
    if asked is None:
        raise ConfigError(f"trials is not set, and a {sweep.document.method} search has no end of its own; trials=20")
    return asked


class _Search:
    """Keeps the slots busy until nothing is left to try."""

    def __init__(
        self,
        study: Study,
        metric: Metric,
        folder: Path,
        head: dict[str, Any],
        slots: list[dict[str, str]],
        limit: int,
    ) -> None:
        self._study = study
        self._metric = metric
        self._folder = folder
        self._head = head
        self._slots = slots
        self._running: list[TrialRun | None] = [None] * len(slots)
        self._display = SweepDisplay(console(), metric, limit)
        self._false_starts, self._has_trained = 0, False

    def run(self) -> None:
        """Return when every trial has an end, or only other machines' are still on their way."""
        try:
            with self._display:
                while self._fill() or any(self._running):
                    self._look()
                    time.sleep(POLL_SECONDS)
        except BaseException:
            self._leave(console())
            raise
        finally:
            self._write()

    def _write(self) -> None:
        trials = write_record(self._folder, self._head, self._study)
        self._display.show(trials, self._running)

    def _fill(self) -> bool:
        """Give every free slot a trial; return whether one was started."""
        started = False
        for index, slot in enumerate(self._slots):
            if self._running[index] is not None:
                continue
            ticket = self._study.next()
            if ticket is None:
                break
            words = [*self._head["words"], *format_overrides(ticket.parameters)]
            trial = TrialRun(ticket, words, self._metric, self._folder, slot)
            self._running[index] = trial
            self._display.began(ticket)
            started = True
        if started:
            self._write()
        return started

    def _look(self) -> None:
        """Report what the trials have measured, and close those that have ended."""
        for index, trial in enumerate(self._running):
            if trial is None:
                continue
            code = self._code(trial)
            self._report(trial)
            if code is not None:
                self._running[index] = None
                self._settle(trial, code)
                self._write()
        self._display.show(None, self._running)

    def _code(self, trial: TrialRun) -> int | None:
        if trial.is_done:
            # Also where an earlier parent died between its end and its entry in the journal.
            trial.wait()
            return 0
        if not trial.was_never_started:
            return trial.poll()
        if trial.pruned_at is not None:
            return Preempted.exit_code
        if trial.is_free():  # else an orphan of the last parent's is still saving
            trial.start()
        return None

    def _report(self, trial: TrialRun) -> None:
        values = trial.values()
        # As far as it was judged: a trial that is told to end may measure once more.
        while trial.num_reported < len(values) and trial.pruned_at is None:
            trial.num_reported += 1
            if self._study.report(trial.ticket.number, trial.num_reported, values[trial.num_reported - 1]):
                trial.pruned_at = trial.num_reported
                trial.stop()

    def _settle(self, trial: TrialRun, code: int) -> None:
        outcome, value, reason = _outcome(trial, code)
        if outcome == "pruned":
            trial.run.write_summary(status="pruned")
        self._study.finish(trial.ticket.number, outcome, value, reason)
        self._display.ended(trial.ticket, outcome, value, reason)
        if code == ConfigError.exit_code and not trial.step:
            self._false_starts += 1
        else:
            self._has_trained = True
        if self._false_starts >= HOPELESS and not self._has_trained:
            raise ConfigError(
                f"the first {HOPELESS} trials could not begin, the sweep is stopped: {reason}."
                f" Set it right, and another run.name or delete {self._folder}: trials that failed are not tried again"
            )

    def _leave(self, screen: Console) -> None:
        """Let the trials save, and wait for them; a second Ctrl-C kills them."""
        left = [trial for trial in self._running if trial is not None]
        for trial in left:
            trial.stop()
        try:
            if left:
                screen.print(f"waiting for {len(left)} trial{'s' * (len(left) > 1)} to save; the same command goes on")
            for trial in left:
                trial.wait()
        except BaseException:
            for trial in left:
                trial.stop(signal.SIGKILL)
            raise


def _end(trial: TrialRun, value: float | None) -> tuple[Outcome, float | None, str | None]:
    """Return what a trial is that trained to its end."""
    if trial.has_diverged:
        return "diverged", value, f"the last {trial.metric} is not a finite number"
    if value is None:
        return "failed", None, f"it never measured {trial.metric}"
    return "done", value, None


def _outcome(trial: TrialRun, code: int) -> tuple[Outcome, float | None, str | None]:
    """Return how a trial ended, its value and the reason."""
    value = trial.best()
    if trial.pruned_at is not None:
        # Also if it came to its end before it could be stopped: what a seed draws must not hang on that.
        return "pruned", value, f"not among the best at value {trial.pruned_at} of {trial.metric}"
    if code == 0:
        return _end(trial, value)
    reason = trial.last_message() or "it said nothing"
    if code == GuardStop.exit_code:
        return "diverged", value, reason
    if code < 0:
        name = signal.Signals(-code).name
        return "failed", value, f"killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}, again and again"
    return "failed", value, reason
