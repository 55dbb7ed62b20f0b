"""A sweep on this machine, without an account: Optuna draws the settings, each trial is a process and a normal run."""

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
from qwlit.core.signals import answering_signals
from qwlit.training.resilience.requeue_limit import counting_requeues
from qwlit.training.tracking.run_folder import RunFolder
from qwlit.tuning.display import SweepDisplay
from qwlit.tuning.record import header, refuse_other_sweep, steps_made, write_record
from qwlit.tuning.slots import allocate_slots
from qwlit.tuning.space import Space, build_space, check_space, format_overrides, grid_points
from qwlit.tuning.study import Outcome, Study
from qwlit.tuning.sweep_file import Metric, Sweep
from qwlit.tuning.trial import TrialRun

POLL_SECONDS = 0.25
# If this many of the first trials cannot begin, all trials have the same fault, and the sweep stops.
MOST_FALSE_STARTS = 3
METRICS = (
    "val/loss",
    "val/accuracy",
    "train/loss",
    "exact_match",
    "throughput/tokens_per_second",
    "memory/peak_gib",
    "wall_seconds",
)
"""Keys of metrics.jsonl and of summary.json that a sweep can optimize."""


def run_local(sweep: Sweep, overrides: list[str], *, trials: int | None, jobs: int | None) -> Path:
    """Run the sweep, or resume an interrupted one, until all its trials have ended. Return its folder.

    Args:
        overrides: of every trial, after those in the sweep file's command.
        trials: number of trials in all, over every machine and restart.
        jobs: number of trials that run at the same time.

    Raises:
        ConfigError: the sweep cannot run as it is written.
    """
    fixed = [*sweep.overrides, "logger=none", *overrides]
    space = build_space(sweep)
    composed = check_space(sweep, fixed)
    config = composed.config
    folder = sweep_folder(sweep, composed, overrides)
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


def sweep_folder(sweep: Sweep, composed: Composed, overrides: list[str]) -> Path:
    """Return run.root/NAME, where NAME is the typed run.name, or else the sweep's name."""
    named = any(override.partition("=")[0].lstrip("+") == "run.name" for override in overrides)
    return resolve_path(composed.config.run.root) / (str(composed.config.run.name) if named else sweep.name)


def check_metric(sweep: Sweep, config: RunConfig) -> None:
    """Refuse a metric that no trial will measure.

    Raises:
        ConfigError: naming the setting to change.
    """
    data, name = config.data, sweep.document.metric.name
    if name not in METRICS:
        raise ConfigError(
            f"{sweep.path}: metric.name={name}: no run measures this.{nearest(name, METRICS)}"
            f" Known: {', '.join(METRICS)}"
        )
    if name == "exact_match" and not data.exact_match:
        raise ConfigError("the sweep's metric is exact_match; set data.exact_match to a number of samples")
    if not name.startswith("val"):
        return
    if data.val_path is None and not data.val_fraction:
        raise ConfigError(f"the sweep's metric is {name}; set data.val_path or data.val_fraction")
    if not config.validation.each_epoch and config.validation.every_steps is None:
        raise ConfigError(f"the sweep's metric is {name}; set validation.each_epoch=true or every_steps")


def number_of_trials(sweep: Sweep, space: Space, trials: int | None) -> int:
    """Return the number of trials in all.

    Raises:
        ConfigError: neither `trials` nor the file gives a number, and the method is not a grid.
    """
    asked = trials or sweep.document.run_cap
    if sweep.document.method == "grid":
        points = 1
        for values in grid_points(space).values():
            points *= len(values)
        return min(points, asked or points)
    if asked is None:
        raise ConfigError(f"trials is not set, and a {sweep.document.method} search needs it; set e.g. trials=20")
    return asked


class _Search:
    """Runs trials in the slots until none is left."""

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
        """Return when every trial has ended, except those that other machines run."""
        try:
            with self._display:
                while self._fill() or any(self._running):
                    self._check_trials()
                    time.sleep(POLL_SECONDS)
        except BaseException:
            self._stop_trials(console())
            raise
        finally:
            self._write()

    def _write(self) -> None:
        trials = write_record(self._folder, self._head, self._study)
        self._display.show(trials, self._running)

    def _fill(self) -> bool:
        """Start a trial in every free slot. Return whether one was started."""
        started = False
        for index, slot in enumerate(self._slots):
            if self._running[index] is not None:
                continue
            ticket = self._study.next()
            if ticket is None:
                break
            overrides = [*self._head["words"], *format_overrides(ticket.parameters)]
            trial = TrialRun(ticket, overrides, self._metric, self._folder, slot)
            self._running[index] = trial
            self._display.began(ticket)
            started = True
        if started:
            self._write()
        return started

    def _check_trials(self) -> None:
        """Report the trials' new values to the study, and close the trials that have ended."""
        for index, trial in enumerate(self._running):
            if trial is None:
                continue
            code = self._exit_code(trial)
            self._report(trial)
            if code is not None:
                self._running[index] = None
                self._close(trial, code)
                self._write()
        self._display.show(None, self._running)

    def _exit_code(self, trial: TrialRun) -> int | None:
        """Return the exit code of a trial that has ended; start one that has not been started."""
        if trial.is_done:
            # The trial may have finished under an earlier parent that died before it wrote this to the journal.
            trial.wait()
            return 0
        if not trial.was_never_started:
            return trial.poll()
        if trial.pruned_at is not None:
            return Preempted.exit_code
        if trial.is_free():  # else a process of the last parent is still saving
            trial.start()
        return None

    def _report(self, trial: TrialRun) -> None:
        values = trial.values()
        # Not beyond the value at which it was pruned: a trial may measure once more before it ends.
        while trial.num_reported < len(values) and trial.pruned_at is None:
            trial.num_reported += 1
            if self._study.report(trial.ticket.number, trial.num_reported, values[trial.num_reported - 1]):
                trial.pruned_at = trial.num_reported
                trial.stop()

    def _close(self, trial: TrialRun, code: int) -> None:
        """Record how a trial ended.

        Raises:
            ConfigError: none of the first trials could begin.
        """
        outcome, value, reason = _outcome(trial, code)
        if outcome == "pruned":
            trial.run.write_summary(status="pruned")
        self._study.finish(trial.ticket.number, outcome, value, reason)
        self._display.ended(trial.ticket, outcome, value, reason)
        if code == ConfigError.exit_code and not trial.step:
            self._false_starts += 1
        else:
            self._has_trained = True
        if self._false_starts >= MOST_FALSE_STARTS and not self._has_trained:
            raise ConfigError(
                f"the first {MOST_FALSE_STARTS} trials could not begin, the sweep is stopped: {reason}. Correct this,"
                f" and set another run.name or delete {self._folder}: failed trials are not tried again"
            )

    def _stop_trials(self, screen: Console) -> None:
        """Tell the running trials to save, and wait for them; a second Ctrl-C kills them."""
        running = [trial for trial in self._running if trial is not None]
        for trial in running:
            trial.stop()
        try:
            if running:
                count = f"{len(running)} trial{'s' * (len(running) > 1)}"
                screen.print(f"waiting for {count} to save; the same command resumes the sweep")
            for trial in running:
                trial.wait()
        except BaseException:
            for trial in running:
                trial.stop(signal.SIGKILL)
            raise


def _end(trial: TrialRun, value: float | None) -> tuple[Outcome, float | None, str | None]:
    """Return outcome, value and reason of a trial that finished its training."""
    if trial.has_diverged:
        return "diverged", value, f"the last {trial.metric} is not a finite number"
    if value is None:
        return "failed", None, f"the trial never measured {trial.metric}"
    return "done", value, None


def _outcome(trial: TrialRun, code: int) -> tuple[Outcome, float | None, str | None]:
    """Return outcome, value and reason of a trial that has ended."""
    value = trial.best()
    if trial.pruned_at is not None:
        # Even if it finished before it could be stopped: later draws must not depend on that race.
        return "pruned", value, f"not among the best at value {trial.pruned_at} of {trial.metric}"
    if code == 0:
        return _end(trial, value)
    reason = trial.last_message() or "the trial printed nothing"
    if code == GuardStop.exit_code:
        return "diverged", value, reason
    if code < 0:
        name = signal.Signals(-code).name
        return "failed", value, f"killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''} several times"
    return "failed", value, reason
