"""The lock that lets only one launch write to a run folder, and how rank 0 tells the other ranks that it is ready."""

import contextlib
import os
import time
from typing import Self

from qwlit.core.disk import opened_without_links, reason_of_disk, remedy_of
from qwlit.core.errors import ConfigError
from qwlit.core.files import is_locked, lock_holder, locked, this_process
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
from qwlit.core.slurm import was_requeued
from qwlit.core.streams import say
from qwlit.core.waiting import NOTICE_SECONDS
from qwlit.training.tracking.run_folder import RunFolder

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
                f"run.root: {path} cannot be written: {reason_of_disk(error)}; {remedy_of(error)}"
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
        with open(self._path, "w", encoding="utf-8", opener=opened_without_links) as handle:
            handle.write(f"{this_process()}\n{launch_token()}{state}")

    def _read(self) -> str:
        """Return the last line of the lock file."""
        return self._path.read_text(encoding="utf-8").rpartition("\n")[2] if self._path.exists() else ""
