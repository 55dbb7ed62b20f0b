"""One trial: a training in a process of its own, whose metrics are read as they are written."""

import json
import math
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

from qwlit.core.children import start_child
from qwlit.core.errors import Interrupted, Preempted
from qwlit.core.files import is_held, read_json_lines
from qwlit.training.tracking.run_folder import FINISHED, RunFolder
from qwlit.tuning.study import Ticket
from qwlit.tuning.sweep_file import Metric

# Ends that another attempt goes on from: killed, preempted or interrupted by somebody else.
RESUMABLE = (Preempted.exit_code, Interrupted.exit_code)
RESTARTS = 3
"""At the same step, of one that is killed again and again."""
# The sweep is the task and has the job requeued; its trials start their own ranks, and only save.
OF_THE_SWEEP = "SLURM_"


class Tail:
    """The rows of a .jsonl file that is being written, each parsed once; anew where the file was cut back."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = self._offset = 0
        self.rows: list[dict[str, Any]] = []

    def read(self) -> list[dict[str, Any]]:
        """Return all rows so far."""
        try:
            with self._path.open("rb") as handle:
                status = os.fstat(handle.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._inode, self._offset, self.rows = status.st_ino, 0, []
                handle.seek(self._offset)
                whole, newline, _ = handle.read().rpartition(b"\n")
        except FileNotFoundError:
            return self.rows
        self._offset += len(whole) + len(newline)
        for line in whole.splitlines():
            try:
                self.rows.append(json.loads(line))
            except ValueError:
                continue
        return self.rows


def start_training(words: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start `train` as a process of its own, which saves and leaves when this one is killed."""
    own = {key: value for key, value in os.environ.items() if not key.startswith(OF_THE_SWEEP)}
    return start_child(["-m", "qwlit", "train", *words], log, own | environment, orphaned=signal.SIGTERM)


def last_message(log: Path) -> str | None:
    """Return what a training said of its end."""
    try:
        said = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return None
    lines = [line for line in said if line.strip()]
    own = [line for line in lines if line.startswith("qwlit train")]
    return (own or lines)[-1] if lines else None


def values_in(rows: list[dict[str, Any]], metric: Metric) -> list[float]:
    """Return the metric's values; one that is not finite is NaN."""
    found = [row[metric.name] for row in rows if metric.name in row]
    return [math.nan if value is None else float(value) for value in found]


def best_value(run: RunFolder, metric: Metric) -> float | None:
    """Return the best value, of metrics.jsonl or else of summary.json."""
    values = values_in(read_json_lines(run.path / "metrics.jsonl"), metric)
    best = metric.best(values)
    if best is not None:
        return best
    value = run.read_summary().get(metric.name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


class TrialRun:
    """A trial that this process runs."""

    def __init__(self, ticket: Ticket, words: list[str], metric: Metric, folder: Path, environment: dict[str, str]):
        """`words` are all overrides of `train` but the run's place; `folder` is the sweep's."""
        self.ticket = ticket
        self.run = RunFolder(folder / name_of(ticket.number))
        self._words = [*words, f"run.root={folder}", f"run.name={self.run.path.name}", "run.overwrite=false"]
        self._metric = metric
        self._environment = environment
        self._log = folder / "logs" / f"{self.run.path.name}.log"
        self._tail = Tail(self.run.path / "metrics.jsonl")
        self._process: subprocess.Popen[bytes] | None = None
        self._restarts, self._step = 0, -1
        self.pruned_at = ticket.pruned_at
        self.num_reported = ticket.num_reported

    @property
    def metric(self) -> str:
        return self._metric.name

    @property
    def was_never_started(self) -> bool:
        return self._process is None

    @property
    def is_done(self) -> bool:
        return self.run.status == FINISHED

    @property
    def step(self) -> int:
        rows = self._tail.rows
        return int(rows[-1].get("step", 0)) if rows else 0

    def start(self) -> None:
        """Train, from where an earlier attempt stopped."""
        self._process = start_training(self._words, self._log, self._environment)

    def values(self) -> list[float]:
        """Return the metric's values so far."""
        return values_in(self._tail.read(), self._metric)

    @property
    def has_diverged(self) -> bool:
        values = self.values()
        return bool(values) and not math.isfinite(values[-1])

    def best(self) -> float | None:
        """Return the best value, of a pruned trial among those it was judged by."""
        if self.pruned_at is None:
            return best_value(self.run, self._metric)
        return self._metric.best(self.values()[: self.pruned_at])

    def poll(self) -> int | None:
        """Return the exit code once it has ended for good; one that was killed is started again a few times."""
        assert self._process is not None
        code = self._process.poll()
        if code is None or self.pruned_at is not None or not (code < 0 or code in RESUMABLE):
            return code
        self.values()
        self._restarts = 0 if self.step > self._step else self._restarts
        self._step = self.step
        if self._restarts == RESTARTS:
            return code
        self._restarts += 1
        self.start()
        return None

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Ask it to save and leave."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def wait(self) -> None:
        if self._process is not None:
            self._process.wait()

    def last_message(self) -> str | None:
        return last_message(self._log)

    def is_free(self) -> bool:
        """Whether no other process trains here: an orphan may still be saving."""
        return not is_held(self.run.lock_file)


def name_of(number: int) -> str:
    """Return a trial's run.name."""
    return f"trial-{number:04d}"
