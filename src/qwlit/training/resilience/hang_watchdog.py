"""Find the rank that hangs, while all other ranks wait for it in a collective; name it and end the job.

Each rank has a thread that writes a heartbeat every few seconds into the store of the process group: the rank's number
of steps and the line that its main thread executes. When a rank has made no progress for too long, its thread reads the
heartbeats of all ranks. The missing rank is one without new heartbeats, or one that does not wait for others itself.
"""

import contextlib
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread, main_thread
from typing import Any

import lightning
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch.distributed.distributed_c10d import _get_default_store

from qwlit.core.streams import say

# Assumption: a healthy host runs the thread at least this often, however busy it is.
HEARTBEAT_SECONDS = 5.0
SILENT_HEARTBEATS = 4
# Time to find and report the missing rank before the process group's own time-out.
REPORT_SECONDS = 60.0
LIBRARIES = (str(Path(torch.__file__).parent), str(Path(lightning.__file__).parent))
# A main thread inside these files waits for other ranks: the backward pass exchanges the gradients. On CUDA collectives
# are kernels: the host waits where it next waits for a stream or an event.
WAITING = tuple(str(Path(torch.__file__).parent / folder) for folder in ("distributed", "autograd", "cuda"))


@dataclass(frozen=True)
class Heartbeat:
    """What a rank reports of itself."""

    count: int
    """Heartbeats that this rank has sent so far."""
    host: str
    step: int
    """Optimizer steps done."""
    code_line: str
    """The line that its main thread executes, outside of torch and Lightning."""
    waits: bool
    """Whether the main thread waits for other ranks."""


def name_missing_ranks(beats: dict[int, Heartbeat], silent: set[int]) -> str:
    """Name the ranks that the others wait for.

    Args:
        beats: the last heartbeat of each rank.
        silent: ranks without a new heartbeat.
    """
    if silent:
        return "; ".join(f"{_name(r, beats)} stopped sending heartbeats {_progress(beats[r])}" for r in sorted(silent))
    newest = max(beat.step for beat in beats.values())
    behind = [rank for rank, beat in beats.items() if beat.step < newest]
    not_waiting = [rank for rank, beat in beats.items() if not beat.waits]
    # If no rank is behind, it is one that does not wait. If all wait or none does, nothing tells them apart: name all.
    missing = behind or (not_waiting if len(not_waiting) < len(beats) else []) or list(beats)
    return "; ".join(f"{_name(rank, beats)} is {_progress(beats[rank])}" for rank in missing)


def _name(rank: int, beats: dict[int, Heartbeat]) -> str:
    return f"rank {rank} ({beats[rank].host})"


def _progress(beat: Heartbeat) -> str:
    return f"at step {beat.step}, {beat.code_line}"


class HangWatchdog(Callback):
    """Ends a job of several ranks when no batch ends within `timeout_seconds`; one line names the missing rank."""

    def __init__(self, timeout_seconds: float, record_failure: Callable[[], None]) -> None:
        self._timeout = timeout_seconds
        self._record_failure = record_failure
        self._batches = 0
        self._step = 0
        self._over = Event()

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._step = trainer.global_step
        # A connection of its own: else this thread would wait while the main thread waits for the store.
        store: Any = _get_default_store().clone()  # type: ignore[attr-defined]
        store.set_timeout(timedelta(seconds=2 * HEARTBEAT_SECONDS))
        # Every rank must have a heartbeat before any thread reads them.
        self._publish(store, trainer.global_rank, 0)
        Thread(target=self._watch, args=(store, trainer.global_rank, trainer.world_size), daemon=True).start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._batches, self._step = self._batches + 1, trainer.global_step

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._batches += 1

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._over.set()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        self._over.set()

    def _watch(self, store: Any, rank: int, world_size: int) -> None:
        beat_seconds = min(HEARTBEAT_SECONDS, self._timeout / 8)
        count, moved, seen = 0, time.monotonic(), -1
        heard: list[dict[int, Heartbeat]] = []
        while not self._over.wait(beat_seconds):
            count += 1
            if self._batches != seen:
                seen, moved, heard = self._batches, time.monotonic(), []
            late = time.monotonic() - moved > self._timeout
            try:
                self._publish(store, rank, count)
                if late:
                    heard.append({other: _read(store, other) for other in range(world_size)})
            except RuntimeError:
                # Rank 0 holds the store. Either it hangs, or it has ended, and then a collective reports that.
                if late and not self._over.is_set():
                    self._end(rank, rank, "rank 0 does not answer")
            if len(heard) > SILENT_HEARTBEATS and not self._over.is_set():
                silent = {other for other, beat in heard[-1].items() if beat.count == heard[0][other].count}
                self._end(rank, min(heard[-1].keys() - silent), name_missing_ranks(heard[-1], silent))

    def _publish(self, store: Any, rank: int, count: int) -> None:
        beat = Heartbeat(count, socket.gethostname(), self._step, *_main_thread_position())
        store.set(_key(rank), json.dumps(asdict(beat)))

    def _end(self, rank: int, reporter: int, missing: str) -> None:
        # The lowest rank that still sends heartbeats reports for all.
        if rank == reporter:
            say(
                f"qwlit: no progress for {self._timeout:g} s (hardware.timeout_seconds): {missing};"
                " run the same command to resume from the newest checkpoint"
            )
        if rank == 0:
            # The process must end in any case.
            with contextlib.suppress(Exception):
                self._record_failure()
        else:
            # Rank 0 must print and write first: a launcher ends all ranks as soon as one has ended.
            time.sleep(HEARTBEAT_SECONDS)
        # The main thread hangs in a collective, so no exception can end the process.
        os._exit(1)


def _main_thread_position() -> tuple[str, bool]:
    """Return the line that the main thread executes, and whether it waits for other ranks there."""
    frame = sys._current_frames().get(main_thread().ident or 0)
    stack = traceback.extract_stack(frame)
    own = [entry for entry in stack if not entry.filename.startswith(LIBRARIES)]
    waits = any(entry.filename.startswith(WAITING) for entry in stack[-3:])
    last = own[-1] if own else stack[-1]
    return f"{'/'.join(Path(last.filename).parts[-2:])}:{last.lineno} ({last.name})", waits


def _key(rank: int) -> str:
    return f"qwlit-beat-{rank}"


def _read(store: Any, rank: int) -> Heartbeat:
    """Return the last heartbeat of a rank.

    Raises:
        RuntimeError: the store does not answer, or the rank has not started to train.
    """
    return Heartbeat(**json.loads(store.get(_key(rank))))
