"""The run folder: its files, and the lock that lets only one launch write to it.

Users' scripts read these files, so their names and fields are an interface; see docs/run-folder.md.
"""

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from rich.markup import escape

from qwlit.core.console import console
from qwlit.core.disk import reason_of_disk, remedy_of
from qwlit.core.errors import ConfigError
from qwlit.core.files import (
    is_locked,
    lock_holder,
    locked,
    read_json,
    read_json_lines,
    this_process,
    write_json_atomic,
    write_text_atomic,
)
from qwlit.core.ranks import (
    PROCESS_START,
    RANK_VARIABLES,
    READY_VARIABLE,
    die_with_launcher,
    die_with_parent,
    is_rank_zero,
    launch_token,
    rank_label,
    unset_hint,
)
from qwlit.core.slurm import job_id, was_requeued
from qwlit.core.streams import say
from qwlit.core.waiting import NOTICE_SECONDS
from qwlit.training.tracking.record_file import RecordFile

RUNNING, FINISHED = "running", "done"
METRICS = "metrics.jsonl"
STREAMS = (METRICS, "events.jsonl", "trace.jsonl", "samples.jsonl")
"""Files to which a run appends a record at a time."""


ROLLED_BACK = "rolled_back.jsonl"
"""Records of the steps that the run went back over, each with its file and the step to which the run went back."""


@dataclass(frozen=True)
class RunFolder:
    """The paths and files of one run. Only rank 0 writes; on other ranks writing does nothing."""

    path: Path
    _records: dict[str, RecordFile] = field(default_factory=dict, init=False, repr=False, compare=False)
    """The files of `STREAMS`, from their first record on."""
    _summary: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """The entries of summary.json that this launch has written or could not write."""
    _failing: set[str] = field(default_factory=set, init=False, repr=False, compare=False)
    """Names of the files of which the user knows that they cannot be written."""

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def lock_file(self) -> Path:
        """The lock file, beside the folder: the name stays locked when the folder is deleted or renamed."""
        return self.path.parent / ".locks" / self.path.name

    @property
    def lock_files(self) -> list[Path]:
        """All lock files that a run holds: where its folder is a link, also that of the folder to which it links."""
        linked = [RunFolder(self.path.resolve()).lock_file] if self.path.is_symlink() else []
        return [self.lock_file, *linked]

    @property
    def is_in_use(self) -> bool:
        """Whether a process trains into this folder, under this name or another one.

        Raises:
            OSError: the lock cannot be read.
        """
        return any(is_locked(file) for file in self.lock_files)

    @property
    def status(self) -> str | None:
        """The status in summary.json; None where there is no run yet."""
        return self.read_summary().get("status")

    @property
    def holds_run(self) -> bool:
        return self.status is not None or self.config_file.exists()

    @property
    def belongs_to_this_job(self) -> bool:
        """Whether this is a requeued Slurm job, and an earlier start of the same job began this run."""
        return was_requeued() and self.read_summary().get("job") == job_id()

    def read_summary(self) -> dict[str, Any]:
        return read_json(self.path / "summary.json")

    def write_summary(self, **entries: Any) -> None:
        """Merge `entries` into summary.json, and those of before if they could not be written or were removed."""
        if is_rank_zero():
            self._summary.update(entries)
            write_json_atomic(self.path / "summary.json", jsonable(self.read_summary() | self._summary))
            self._failing.discard("summary.json")

    def try_write_summary(self, **entries: Any) -> None:
        """Merge `entries` into summary.json if it can be written; else the next call does it."""
        try:
            self.write_summary(**entries)
        except OSError as error:
            self._say_failing("summary.json", error)

    def write_text(self, name: str, text: str) -> None:
        if is_rank_zero():
            write_text_atomic(self.path / name, text)

    def write_json(self, name: str, value: Any) -> None:
        if is_rank_zero():
            write_json_atomic(self.path / name, jsonable(value))

    def append_metrics(self, step: int, record: Mapping[str, float | None]) -> None:
        self._append(METRICS, {"step": step, **record})

    def append_event(self, step: int, event: str, **details: Any) -> None:
        """Record an event: a skipped step, a checkpoint, a preemption, a warning."""
        self._append("events.jsonl", {"step": step, "event": event, "time": round(time.time(), 3), **details})

    def append_trace(self, step: int, record: dict[str, str]) -> None:
        self._append("trace.jsonl", {"step": step, **record})

    def append_sample(self, step: int, prompt: str, answer: str, entropy: float) -> None:
        """Record what the model answers in the middle of the training; `entropy`: of the next token, mean, nats."""
        self._append("samples.jsonl", {"step": step, "prompt": prompt, "answer": answer, "entropy": entropy})

    def write_answers(self, answers: Iterable[dict[str, Any]]) -> None:
        """Write the trained model's answers after those in the middle of the training, which have a step."""
        before = [record for record in read_json_lines(self.path / "samples.jsonl") if "step" in record]
        self.write_records("samples.jsonl", [*before, *answers])

    def _append(self, name: str, record: dict[str, Any]) -> None:
        """Append a record; where that is impossible, keep it for the next call, and say so once."""
        if not is_rank_zero():
            return
        try:
            is_whole = self._record_file(name).append(jsonable(record))
        except OSError as error:
            self._say_failing(name, error)
            return
        if name in self._failing:
            self._failing.discard(name)
            self._note(f"{self.path / name} is written again, and lacks nothing")
        if not is_whole:
            message = f"{self.path / name} was removed or cut off during the run: its records of before are gone"
            self._note(message)
            self.append_event(record["step"], "finding", message=message)

    def _record_file(self, name: str) -> RecordFile:
        return self._records.setdefault(name, RecordFile(self.path / name))

    def _say_failing(self, name: str, error: OSError) -> None:
        if name not in self._failing:
            self._failing.add(name)
            self._note(
                f"{self.path / name} cannot be written: {reason_of_disk(error)}; {remedy_of(error)}. The training goes"
                " on, and writes later what is missing"
            )

    def _note(self, message: str) -> None:
        console().print(f"  [yellow]note[/]      {escape(message)}")

    @property
    def has_begun(self) -> bool:
        """Whether this launch has written a status: the run in this folder is its own."""
        return "status" in self._summary

    @property
    def kept_records(self) -> dict[str, list[str]]:
        """File name → the lines that could not be written yet, for the checkpoint."""
        return {name: list(file.kept) for name, file in self._records.items() if file.kept}

    def keep_records(self, kept: Mapping[str, list[str]]) -> None:
        """Take over the `kept_records` of the checkpoint at which the run resumes."""
        for name in STREAMS:
            if lines := kept.get(name):
                self._record_file(name).keep(lines)

    def write_kept_records(self) -> None:
        """Write the records that could not be written before.

        Raises:
            OSError: they still cannot be written.
        """
        for file in self._records.values():
            file.write_kept()

    def write_records(self, name: str, records: Iterable[dict[str, Any]]) -> None:
        """Write a whole .jsonl file at once."""
        self.write_text(name, "".join(json.dumps(jsonable(r), ensure_ascii=False) + "\n" for r in records))

    def drop_records_after(self, step: int) -> None:
        """Delete the records after `step`, because the run resumes there and writes them again."""
        if is_rank_zero():
            for name in STREAMS:
                self._drop_records(name, lambda r: isinstance(r.get("step"), int) and r["step"] <= step)
            # A run that resumes before the step to which it once went back will come there again.
            self._drop_records(ROLLED_BACK, lambda r: r.get("rolled_back_to", 0) <= step)

    def _drop_records(self, name: str, is_valid: Callable[[dict[str, Any]], bool]) -> None:
        """Delete the records that are not valid any more, also among those that could not be written yet."""
        if (self.path / name).exists():
            self.write_records(name, filter(is_valid, read_json_lines(self.path / name)))
        if before := self._records.pop(name, None):
            self._record_file(name).keep(line for line in before.kept if is_valid(json.loads(line)))

    def set_aside_records_after(self, step: int) -> None:
        """Move the records after `step` into rolled_back.jsonl, because the run goes back to that step."""
        with contextlib.suppress(OSError):
            self.write_kept_records()
        for name in STREAMS:
            file = self._record_file(name)
            unwritten = map(json.loads, file.lacking(file.kept))
            for record in (*read_json_lines(self.path / name), *unwritten):
                if isinstance(record.get("step"), int) and record["step"] > step:
                    self._append(ROLLED_BACK, {"rolled_back_to": step, "file": name, **record})
        self.drop_records_after(step)

    def read_all_metrics(self) -> list[dict[str, Any]]:
        """Return the records of metrics.jsonl in the order in which they were made, with those that were set aside."""
        records, made = read_json_lines(self.path / METRICS), []
        for record in read_json_lines(self.path / ROLLED_BACK):
            if record.pop("file", None) == METRICS:
                target = record.pop("rolled_back_to", 0)
                while records and records[0].get("step", 0) <= target:
                    made.append(records.pop(0))
                made.append(record)
        return made + records

    def rename_old_run(self) -> Path:
        """Rename this folder to the next free `<name>.before-N`; return the new path."""
        index = 1
        while (renamed := self.path.with_name(f"{self.path.name}.before-{index}")).exists():
            index += 1
        self.path.rename(renamed)
        return renamed

    def delete(self) -> None:
        """Delete the run. Rename it first, so that a half-deleted folder never looks like a run."""
        if self.path.is_symlink():
            self.path.unlink()
            return
        renamed = self.path.with_name(f".{self.path.name}.deleted-{os.getpid()}")
        self.path.rename(renamed)
        shutil.rmtree(renamed)


def jsonable(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return value


BEGUN, ENDED = " begun", " ended"


class RunLock:
    """The lock of a run folder. Rank 0 holds it while it runs; the other ranks wait until rank 0 announces the folder.

    The lock file names rank 0's process. Its last line tells the other ranks of the launch how far rank 0 is: the
    launch token and `BEGUN` when it has the lock, the token alone when the folder is ready, the token and `ENDED` when
    it ended before that.
    """

    POLL_SECONDS = 0.2
    TRY_SECONDS, REQUEUED_TRY_SECONDS = 0.5, 60.0

    def __init__(self, folder: RunFolder, wait_seconds: float = 600.0) -> None:
        """`wait_seconds`: how long the other ranks wait for rank 0 to take the lock."""
        self._folder = folder
        self._wait_seconds = wait_seconds
        self._path = folder.lock_file
        self._held = contextlib.ExitStack()
        self._announced = False

    def __enter__(self) -> Self:
        die_with_launcher()
        started_by, _, ready = os.environ.get(READY_VARIABLE, "").partition(" ")
        if is_rank_zero():
            self._acquire()
        elif ready == str(self._folder.path):
            die_with_parent(int(started_by))
        else:
            self._wait()
        return self

    def __exit__(self, *exception: object) -> None:
        if is_rank_zero() and not self._announced:
            # The error that ends the run is the one to report.
            with contextlib.suppress(OSError):
                self._write(ENDED)
        self._held.close()

    def _acquire(self) -> None:
        # Another rank may be testing the lock, or the job's earlier start may still be ending.
        end = time.monotonic() + (self.REQUEUED_TRY_SECONDS if was_requeued() else self.TRY_SECONDS)
        while holder := self._try_acquire():
            if time.monotonic() > end:
                has_rank = any(name in os.environ for name in RANK_VARIABLES)
                own = "; ranks of one run each need their own RANK, or NODE_RANK and LOCAL_RANK" if has_rank else ""
                raise ConfigError(
                    f"{self._folder.path} is in use by {holder}; wait for it, or set another run.name{own}"
                )
            time.sleep(self.POLL_SECONDS / 2)

    def _try_acquire(self) -> str | None:
        """Take all locks of the folder; if another process holds one, take none and return its name."""
        path = self._path
        try:
            with contextlib.ExitStack() as held:
                for path in self._folder.lock_files:
                    held.enter_context(locked(path, blocking=False))
                self._write(BEGUN)
                self._held = held.pop_all()
        except BlockingIOError:
            return lock_holder(path)
        except OSError as error:
            raise ConfigError(
                f"run.root: {path.parents[1]} cannot be written: {reason_of_disk(error)}; {remedy_of(error)}"
            ) from None
        return None

    def announce_ready(self) -> None:
        """On rank 0: tell the other ranks that all files they read exist. Processes started from now on do not wait."""
        if is_rank_zero():
            self._announced = True
            self._write("")
            os.environ[READY_VARIABLE] = f"{os.getpid()} {self._folder.path}"

    def _wait(self) -> None:
        """Wait until rank 0 of this launch holds the lock and has announced that the folder is ready.

        Raises:
            ConfigError: rank 0 released the lock before that, or did not take it in time.
        """
        token = launch_token()
        began = time.monotonic()
        said = False
        while True:
            # Read the text before the lock is tested: if rank 0 had begun and the lock is free now, it has ended.
            text = self._read()
            in_use = is_locked(self._path)
            if in_use and text == token:
                return
            # An earlier launch may have had the same token, such as torchrun's with its default settings.
            is_ours = text.startswith(token)
            # The clock may have been set back since: a time to come says nothing.
            is_new = is_ours and PROCESS_START < self._path.stat().st_mtime <= time.time()
            if is_new and (text.endswith(ENDED) or not in_use):
                raise ConfigError("rank 0 ended before the run started; its own message says why")
            seconds = 0 if is_ours and in_use else time.monotonic() - began
            run = f"{self._folder.path}{f', in use by {lock_holder(self._path)} of another launch' if in_use else ''}"
            if seconds > self._wait_seconds:
                raise ConfigError(
                    f"rank 0 did not come to {run} within {self._wait_seconds:g} s (hardware.timeout_seconds): start"
                    f" all ranks of the run, with the same run.name and run.root{unset_hint()}"
                )
            if seconds > NOTICE_SECONDS and not said:
                said = True
                say(f"qwlit: {rank_label()} waits for rank 0 of the run {run}{unset_hint()}")
            time.sleep(self.POLL_SECONDS)

    def _write(self, state: str) -> None:
        self._path.write_text(f"{this_process()}\n{launch_token()}{state}", encoding="utf-8")

    def _read(self) -> str:
        """Return the last line of the lock file."""
        return self._path.read_text(encoding="utf-8").rpartition("\n")[2] if self._path.exists() else ""
