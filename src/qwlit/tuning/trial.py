"""One trial: a training in a process of its own. The parent reads its metrics while they are written."""

import json
import math
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

from qwlit.core.children import start_child
from qwlit.core.errors import GuardStop, Interrupted, Preempted
from qwlit.core.metric import Metric
from qwlit.training.tracking.run_folder import FINISHED, RunFolder
from qwlit.tuning.space import keys_of
from qwlit.tuning.study import AssignedTrial, Outcome

# Exit codes of a trial that was preempted or interrupted from outside: it resumes when it is started again.
RESUMABLE = (Preempted.exit_code, Interrupted.exit_code)
RESTARTS = 3
"""How often a killed trial is started again without a new step."""


def without_rollbacks(overrides: list[str]) -> list[str]:
    """Let a trial end where it would go back: with half of its learning rate it would be a trial of another one."""
    return overrides if keys_of(overrides) & {"guard", "guard.max_rollbacks"} else [*overrides, "guard.max_rollbacks=0"]


class JsonlTail:
    """Reads a .jsonl file that is being written. It parses each record once, and all again if the file was replaced."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = self._offset = 0
        self.records: list[dict[str, Any]] = []

    def read(self) -> list[dict[str, Any]]:
        """Return all records so far."""
        try:
            with self._path.open("rb") as handle:
                status = os.fstat(handle.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._inode, self._offset, self.records = status.st_ino, 0, []
                handle.seek(self._offset)
                # The last line may be incomplete: leave it for the next call.
                whole, newline, _ = handle.read().rpartition(b"\n")
        except FileNotFoundError:
            return self.records
        self._offset += len(whole) + len(newline)
        for line in whole.splitlines():
            try:
                self.records.append(json.loads(line))
            except ValueError:
                continue
        return self.records


def start_training(overrides: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start `train` as a process of its own. It saves and ends if this process is killed.

    Of overrides with the same key, the last one counts.
    """
    # Hide Slurm's variables: the sweep is the Slurm task and requeues the job, and trials start their own ranks.
    own = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    return start_child(["-m", "qwlit", "train", *overrides], log, own | environment, parent_death_signal=signal.SIGTERM)


def last_message(log: Path) -> str | None:
    """Return the last line that qwlit wrote to a training's log, else the last line; None if there is none."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return None
    lines = [line for line in text if line.strip()]
    own = [line for line in lines if line.startswith("qwlit train")]
    return (own or lines)[-1] if lines else None


def values_in(records: list[dict[str, Any]], metric: Metric) -> list[float]:
    """Return the metric's values; a value that is not finite is NaN."""
    found = [record[metric.name] for record in records if metric.name in record]
    return [math.nan if value is None else float(value) for value in found]


class TrialRun:
    """A trial that this process runs."""

    def __init__(
        self, assigned: AssignedTrial, overrides: list[str], metric: Metric, folder: Path, environment: dict[str, str]
    ):
        """`overrides` are all overrides of `train` except run.*; `folder` is the sweep's folder."""
        self.assigned = assigned
        self.run = RunFolder(folder / name_of(assigned.number))
        self._overrides = [
            *without_rollbacks(overrides),
            f"run.root={folder}",
            f"run.name={self.run.path.name}",
            "run.overwrite=false",
        ]
        self._metric = metric
        self._environment = environment
        self._log = folder / "logs" / f"{self.run.path.name}.log"
        self._tail = JsonlTail(self.run.path / "metrics.jsonl")
        self._process: subprocess.Popen[bytes] | None = None
        self._restarts, self._step = 0, -1
        self.pruned_at = assigned.pruned_at
        self.num_reported = assigned.num_reported

    @property
    def step(self) -> int:
        records = self._tail.records
        return int(records[-1].get("step", 0)) if records else 0

    def values(self) -> list[float]:
        """Return the metric's values so far."""
        return values_in(self._tail.read(), self._metric)

    def poll(self) -> int | None:
        """Return the exit code if the trial has ended, else None. Start a trial that does not run yet.

        A killed trial is started again, a few times, and resumes from its checkpoint.
        """
        if self.run.status == FINISHED:
            # The trial may have finished, and the process that ran it ended before it wrote this to the journal.
            self.wait()
            return 0
        if self._process is None:
            if self.pruned_at is not None:
                return Preempted.exit_code
            # A training that an earlier process started may still be saving in this run folder: wait until it ends.
            if not self.run.is_in_use:
                self._start()
            return None
        code = self._process.poll()
        if code is None or self.pruned_at is not None or not (code < 0 or code in RESUMABLE):
            return code
        self.values()
        self._restarts = 0 if self.step > self._step else self._restarts
        self._step = self.step
        if self._restarts == RESTARTS:
            return code
        self._restarts += 1
        self._start()
        return None

    def _start(self) -> None:
        self._process = start_training(self._overrides, self._log, self._environment)

    def outcome(self, code: int) -> tuple[Outcome, float | None, str | None]:
        """Return outcome, value and reason of the trial, which has ended with exit code `code`."""
        metric, values = self._metric, self.values()
        if self.pruned_at is not None:
            # Even if it finished before it could be stopped: later draws must not depend on that race.
            value = metric.best(values[: self.pruned_at])
            return "pruned", value, f"not among the best at value {self.pruned_at} of {metric.name}"
        value = metric.best_of_run(values, self.run.read_summary())
        if code == 0:
            if values and not math.isfinite(values[-1]):
                return "diverged", value, f"the last {metric.name} is not a finite number"
            if value is None:
                return "failed", None, f"the trial never measured {metric.name}"
            return "done", value, None
        reason = last_message(self._log) or "the trial printed nothing"
        if code < 0:
            name = signal.Signals(-code).name
            reason = f"killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''} several times"
        return "diverged" if code == GuardStop.exit_code else "failed", value, reason

    def stop(self, signum: int = signal.SIGTERM) -> None:
        """Send a signal; SIGTERM asks the trial to save and end."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signum)

    def wait(self) -> None:
        if self._process is not None:
            self._process.wait()


def name_of(number: int) -> str:
    """Return a trial's run.name."""
    return f"trial-{number:04d}"
