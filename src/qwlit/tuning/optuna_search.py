"""A sweep on this machine, without an account: Optuna draws the settings, each trial is a process and a normal run."""

import math
import signal
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from qwlit.config.compose import Composed
from qwlit.config.run import RunConfig
from qwlit.core.console import console
from qwlit.core.errors import ConfigError, nearest
from qwlit.core.files import resolve_path
from qwlit.core.metric import Metric, set_loss_key
from qwlit.core.signals import answering_signals
from qwlit.data.config import validation_sets
from qwlit.training.resilience.requeue_limit import counting_requeues
from qwlit.training.tracking.run_folder import RunFolder
from qwlit.tuning.display import SweepDisplay
from qwlit.tuning.record import header, refuse_other_sweep, steps_made, write_record
from qwlit.tuning.slots import allocate_slots
from qwlit.tuning.space import Space, build_space, check_space, format_overrides, grid_points, keys_of
from qwlit.tuning.study import Study
from qwlit.tuning.sweep_file import Sweep
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
    metric, most = sweep.document.metric, config.slurm.max_requeues_in_place
    with (
        closing(Study(folder, sweep, space, trials=limit, seed=config.seed)) as study,
        counting_requeues(RunFolder(folder), lambda: steps_made(folder), most),
        answering_signals(),
    ):
        display = SweepDisplay(console(), metric, limit)
        _Search(study, metric, folder, head, slots, display).run()
    return folder


def sweep_folder(sweep: Sweep, composed: Composed, overrides: list[str]) -> Path:
    """Return run.root/NAME, where NAME is the typed run.name, or else the sweep's name."""
    run = composed.config.run
    return resolve_path(run.root) / (str(run.name) if "run.name" in keys_of(overrides) else sweep.name)


def check_metric(sweep: Sweep, config: RunConfig) -> None:
    """Refuse a metric that no trial will measure.

    Raises:
        ConfigError: naming the setting to change.
    """
    data, name = config.data, sweep.document.metric.name
    known = [*METRICS, *(set_loss_key(name) for name in validation_sets(data.val_path) if name)]
    if name not in known:
        raise ConfigError(
            f"{sweep.path}: metric.name={name}: no run measures this.{nearest(name, known)} Known: {', '.join(known)}"
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
    requested = trials or sweep.document.run_cap
    if sweep.document.method == "grid":
        points = math.prod(len(values) for values in grid_points(space).values())
        return min(points, requested or points)
    if requested is None:
        raise ConfigError(f"trials is not set, and a {sweep.document.method} search needs it; set e.g. trials=20")
    return requested


@dataclass
class _Search:
    """Runs trials in the slots until none is left."""

    study: Study
    metric: Metric
    folder: Path
    head: dict[str, Any]
    slots: list[dict[str, str]]
    display: SweepDisplay
    running: dict[int, TrialRun] = field(default_factory=dict)
    """Number of a slot → the trial in it."""
    false_starts: int = 0
    has_trained: bool = False

    def run(self) -> None:
        """Return when every trial has ended, except those that other machines run."""
        try:
            with self.display:
                while self._fill() or self.running:
                    self._check_trials()
                    time.sleep(POLL_SECONDS)
        except BaseException:
            self._stop_trials(console())
            raise
        finally:
            self._write()

    def _write(self) -> None:
        trials = write_record(self.folder, self.head, self.study)
        self.display.show(trials, self.running)

    def _fill(self) -> bool:
        """Start a trial in every free slot. Return whether one was started."""
        started = False
        for slot, environment in enumerate(self.slots):
            if slot in self.running:
                continue
            assigned = self.study.next()
            if assigned is None:
                break
            overrides = [*self.head["words"], *format_overrides(assigned.parameters)]
            self.running[slot] = TrialRun(assigned, overrides, self.metric, self.folder, environment)
            self.display.began(assigned)
            started = True
        if started:
            self._write()
        return started

    def _check_trials(self) -> None:
        """Report the trials' new values to the study, and close the trials that have ended."""
        for slot, trial in sorted(self.running.items()):
            code = trial.poll()
            self._report(trial)
            if code is not None:
                del self.running[slot]
                self._close(trial, code)
                self._write()
        self.display.show(None, self.running)

    def _report(self, trial: TrialRun) -> None:
        values = trial.values()
        # Report no value after the one at which the study pruned the trial: the trial may measure once more.
        while trial.num_reported < len(values) and trial.pruned_at is None:
            trial.num_reported += 1
            if self.study.report(trial.assigned.number, trial.num_reported, values[trial.num_reported - 1]):
                trial.pruned_at = trial.num_reported
                trial.stop()

    def _close(self, trial: TrialRun, code: int) -> None:
        """Record how a trial ended.

        Raises:
            ConfigError: none of the first trials could begin.
        """
        outcome, value, reason = trial.outcome(code)
        if outcome == "pruned":
            trial.run.write_summary(status="pruned")
        self.study.finish(trial.assigned.number, outcome, value, reason)
        self.display.ended(trial.assigned, outcome, value, reason)
        if code == ConfigError.exit_code and not trial.step:
            self.false_starts += 1
        else:
            self.has_trained = True
        if self.false_starts >= MOST_FALSE_STARTS and not self.has_trained:
            raise ConfigError(
                f"the first {MOST_FALSE_STARTS} trials could not begin, the sweep is stopped: {reason}. Correct this,"
                f" and set another run.name or delete {self.folder}: failed trials are not tried again"
            )

    def _stop_trials(self, screen: Console) -> None:
        """Tell the running trials to save, and wait for them; a second Ctrl-C kills them."""
        running = list(self.running.values())
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
