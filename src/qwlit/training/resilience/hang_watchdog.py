"""A rank that hangs makes all others wait for it: they find out which one it is, say so, and end the job.

Each rank has a thread that notes every few seconds, in the store through which the ranks have met, that it is alive,
how far it has come and where its main thread stands. When a rank has made no progress for too long, it reads what the
others have noted. A rank that is not heard of, or that is not itself waiting for others, is the one missing.
"""

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

# Assumption: a healthy host runs a thread at least that often, however busy it is.
HEARTBEAT_SECONDS = 5.0
SILENT_HEARTBEATS = 4
# For finding out who is missing and saying so, before the process group gives up.
REPORT_SECONDS = 60.0
LIBRARIES = (str(Path(torch.__file__).parent), str(Path(lightning.__file__).parent))
# Where a main thread stands that waits for other ranks: gradients are exchanged below the backward pass.
WAITING = (str(Path(torch.__file__).parent / "distributed"), str(Path(torch.autograd.__file__).parent))


@dataclass(frozen=True)
class Heartbeat:
    """What a rank notes of itself."""

    number: int
    host: str
    step: int
    """Optimizer steps made."""
    place: str
    """Where its main thread stands, outside of libraries."""
    waits: bool
    """Whether that is an exchange with the other ranks."""


def name_missing_ranks(beats: dict[int, Heartbeat], silent: set[int]) -> str:
    """Name the ranks that the others wait for.

    Args:
        beats: by rank, what was last heard.
        silent: ranks not heard of for a while.
    """
    if silent:
        return "; ".join(f"{_who(rank, beats)} is not heard of since {_stand(beats[rank])}" for rank in sorted(silent))
    newest = max(beat.step for beat in beats.values())
    behind = [rank for rank, beat in beats.items() if beat.step < newest]
    elsewhere = [rank for rank, beat in beats.items() if not beat.waits]
    missing = behind or (elsewhere if len(elsewhere) < len(beats) else []) or list(beats)
    return "; ".join(f"{_who(rank, beats)} is {_stand(beats[rank])}" for rank in missing)


def _who(rank: int, beats: dict[int, Heartbeat]) -> str:
    return f"rank {rank} ({beats[rank].host})"


def _stand(beat: Heartbeat) -> str:
    return f"at step {beat.step}, {beat.place}"


class HangWatchdog(Callback):
    """Ends the job when no batch has been done for `timeout_seconds`, in one line that names the missing rank."""

    def __init__(self, timeout_seconds: float, record_failure: Callable[[], None]) -> None:
        self._timeout = timeout_seconds
        self._record_failure = record_failure
        self._batches = 0
        self._step = 0
        self._over = Event()

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._step = trainer.global_step
        if trainer.world_size > 1:
            # A connection of its own: the threads of a process must not wait for each other's questions.
            store: Any = _get_default_store().clone()  # type: ignore[attr-defined]
            store.set_timeout(timedelta(seconds=2 * HEARTBEAT_SECONDS))
            self._note(store, trainer.global_rank, 0)
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
        number, moved, seen = 0, time.monotonic(), -1
        heard: list[dict[int, Heartbeat]] = []
        while not self._over.wait(beat_seconds):
            number += 1
            if self._batches != seen:
                seen, moved, heard = self._batches, time.monotonic(), []
            late = time.monotonic() - moved > self._timeout
            try:
                self._note(store, rank, number)
                if late:
                    heard.append({other: _read(store, other) for other in range(world_size)})
            except RuntimeError:
                # The store lives in rank 0: it does not answer, or has ended, which others say.
                if late and not self._over.is_set():
                    self._end(rank, rank, "rank 0 does not answer")
            if len(heard) > SILENT_HEARTBEATS and not self._over.is_set():
                silent = {other for other, beat in heard[-1].items() if beat.number == heard[0][other].number}
                self._end(rank, min(heard[-1].keys() - silent), name_missing_ranks(heard[-1], silent))

    def _note(self, store: Any, rank: int, number: int) -> None:
        store.set(_key(rank), json.dumps(asdict(Heartbeat(number, socket.gethostname(), self._step, *_place()))))

    def _end(self, rank: int, speaker: int, missing: str) -> None:
        # One of those who can still speak does; whoever hangs says nothing.
        if rank == speaker:
            print(
                f"qwlit: no progress for {self._timeout:g} s (hardware.timeout_seconds): {missing};"
                " the same command goes on from the newest checkpoint",
                file=sys.stderr,
                flush=True,
            )
        if rank == 0:
            self._record_failure()
        else:
            # Rank 0 takes those it has started with it, and is to speak and write first.
            time.sleep(HEARTBEAT_SECONDS)
        os._exit(1)


def _place() -> tuple[str, bool]:
    """Return where the main thread stands, and whether it waits for other ranks there."""
    frame = sys._current_frames().get(main_thread().ident or 0)
    stack = traceback.extract_stack(frame)
    own = [entry for entry in stack if not entry.filename.startswith(LIBRARIES)]
    waits = any(entry.filename.startswith(WAITING) for entry in stack[-3:])
    last = own[-1] if own else stack[-1]
    return f"{'/'.join(Path(last.filename).parts[-2:])}:{last.lineno} ({last.name})", waits


def _key(rank: int) -> str:
    return f"qwlit-beat-{rank}"


def _read(store: Any, rank: int) -> Heartbeat:
    """Return what a rank has noted last.

    Raises:
        RuntimeError: the store does not answer, or the rank has not begun to train.
    """
    return Heartbeat(**json.loads(store.get(_key(rank))))
