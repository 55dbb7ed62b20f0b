"""The run folder and its files.

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
from typing import Any

from rich.markup import escape

from qwlit.core.console import console
from qwlit.core.disk import reason_of_disk, remedy_of
from qwlit.core.files import is_locked, lock_file, read_json, read_json_lines, write_json_atomic, write_text_atomic
from qwlit.core.ranks import is_rank_zero
from qwlit.core.slurm import job_id, was_requeued
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
        return lock_file(self.path)

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
        for name in (*STREAMS, ROLLED_BACK):
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

    def drop_set_aside(self, num_rollbacks: int) -> None:
        """Delete what was set aside for a rollback after the first `num_rollbacks`.

        The run was killed before it decided to go back, or it resumes before that step and will come there again.
        """
        if is_rank_zero():
            self._drop_records(ROLLED_BACK, lambda r: r.get("rollback", 0) < num_rollbacks)

    def _drop_records(self, name: str, is_valid: Callable[[dict[str, Any]], bool]) -> None:
        """Delete the records that are not valid any more, also among those that could not be written yet."""
        if (self.path / name).exists():
            self.write_records(name, filter(is_valid, read_json_lines(self.path / name)))
        if before := self._records.pop(name, None):
            self._record_file(name).keep(line for line in before.kept if is_valid(json.loads(line)))

    def set_aside_records_after(self, step: int, num_rollbacks: int) -> None:
        """Copy the records after `step` into rolled_back.jsonl, because the run is about to go back to that step.

        A kill loses none and doubles none: they leave their files when the decision is recorded, and a start
        without the decision deletes the copies.

        Args:
            num_rollbacks: how often the run went back before.
        """
        with contextlib.suppress(OSError):
            self.write_kept_records()
        self.drop_set_aside(num_rollbacks)
        for name in STREAMS:
            file = self._record_file(name)
            unwritten = map(json.loads, file.lacking(file.kept))
            for record in (*read_json_lines(self.path / name), *unwritten):
                if isinstance(record.get("step"), int) and record["step"] > step:
                    which = {"rolled_back_to": step, "rollback": num_rollbacks, "file": name}
                    self._append(ROLLED_BACK, which | record)

    def read_all_metrics(self) -> list[dict[str, Any]]:
        """Return the records of metrics.jsonl in the order in which they were made, with those that were set aside."""
        records, made = read_json_lines(self.path / METRICS), []
        for record in read_json_lines(self.path / ROLLED_BACK):
            if record.pop("file", None) == METRICS:
                target = record.pop("rolled_back_to", 0)
                record.pop("rollback", None)
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
