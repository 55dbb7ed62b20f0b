"""Start the other ranks of a single-node run, watch them, and say which one was lost."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from subprocess import Popen
from threading import Thread
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from qwlit.core.errors import ConfigError, QwlitError
from qwlit.core.signals import Phase, enter_phase, handling
from qwlit.core.streams import say

# Parts of gloo's and NCCL's error messages when the process at the other end has ended.
LOST_PEER = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "remote process exited",
    "Timed out waiting",
    "timed out",
)
LAUNCHER_SECONDS = 1.0
# A collective usually fails as soon as its peer has ended, but NCCL may wait for its time-out of many minutes.
GRACE_SECONDS = 20.0


class RankLauncher(_SubprocessScriptLauncher):
    """Starts the other ranks, which ignore the handled signals until they train: rank 0 handles signals for them.

    Lightning's observer kills all ranks when one has ended; it gets nothing to watch (`procs` is empty), so that a
    failing collective can report the rank first, in `lost_rank`. If it hangs instead, `_watch` ends the job.
    """

    procs: list[Popen[bytes]]

    def __init__(self, cluster_environment: Any, num_processes: int, num_nodes: int) -> None:
        super().__init__(cluster_environment, num_processes, num_nodes)
        self.children: list[Popen[bytes]] = []
        self.record_failure: Callable[[], None] = lambda: None

    def _call_children_scripts(self) -> None:
        try:
            # An ignored signal stays ignored over exec: Python would print a traceback at a Ctrl-C before `main`. This
            # process must not miss the other signals, so a rank can ignore them only in `main`.
            with handling([signal.SIGINT], signal.SIG_IGN):
                super()._call_children_scripts()
        finally:
            self.children, self.procs = self.procs, []
        Thread(target=self._watch, daemon=True).start()

    def kill(self, signum: int) -> None:
        for child in self.children:
            child.send_signal(signum)

    def failed_ranks(self) -> dict[int, int]:
        """Return the exit code of each rank that this process started and that has failed."""
        codes = {rank: child.poll() for rank, child in enumerate(self.children, start=1)}
        return {rank: code for rank, code in codes.items() if code}

    def _watch(self) -> None:
        while not self.failed_ranks():
            time.sleep(1.0)
        time.sleep(GRACE_SECONDS)
        failed = self.failed_ranks()
        if not failed:
            return  # `stop_watching_ranks` was called: the training is over
        lost = LostRank(failed)
        # The process must end in any case.
        with contextlib.suppress(Exception):
            self.record_failure()
        say(f"qwlit: {lost}")
        self.kill(signal.SIGKILL)
        os._exit(lost.exit_code)


class LostRank(QwlitError):
    """Another rank has ended, and this rank was waiting for it."""

    def __init__(self, exit_codes: dict[int, int]) -> None:
        named = ", ".join(f"rank {rank} ended with {_describe_exit(code)}" for rank, code in exit_codes.items())
        # A rank that found an error in the settings or the data has printed it.
        bad_input = ConfigError.exit_code in exit_codes.values()
        self.exit_code = ConfigError.exit_code if bad_input else QwlitError.exit_code
        resume = "run the same command to resume from the newest checkpoint"
        remedy = "its own message says why" if bad_input else resume
        super().__init__(f"lost another rank: {named or 'see the messages of the other ranks'}; {remedy}")


def lost_rank(trainer: Trainer, error: BaseException) -> LostRank | None:
    """Return the error when a collective failed because another rank has ended; None for any other failure."""
    if trainer.world_size == 1 or not isinstance(error, RuntimeError) or isinstance(error, QwlitError):
        return None
    if not any(part in str(error) for part in LOST_PEER):
        return None
    # torchrun now sends SIGTERM to this rank too; it must not end as preempted.
    enter_phase(Phase.ENDING)
    # Wait until the operating system reports the exit code of the other rank.
    time.sleep(LAUNCHER_SECONDS)
    launcher = trainer.strategy.launcher
    return LostRank(launcher.failed_ranks() if isinstance(launcher, RankLauncher) else {})


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"code {code}"
    return f"signal {-code}" + (" (out of memory?)" if code == -signal.SIGKILL else "")


def share_launcher(trainer: Trainer, earlier: Any) -> Any:
    """Return the launcher that started the ranks of this process; a later trainer of the run watches the same ranks.

    Args:
        earlier: the launcher of the run's first trainer; None where this is the first.
    """
    if isinstance(earlier, RankLauncher):
        trainer.strategy._launcher = earlier
    return trainer.strategy.launcher


def stop_watching_ranks(trainer: Trainer) -> None:
    """Stop watching the ranks that this process has started: the training is over, and they may end."""
    if isinstance(trainer.strategy.launcher, RankLauncher):
        trainer.strategy.launcher.children = []


def kill_started_ranks(trainer: Trainer) -> None:
    """Kill the ranks that this process has started: the run has ended, and they would wait or add follow-up errors."""
    if isinstance(trainer.strategy.launcher, RankLauncher):
        trainer.strategy.launcher.kill(signal.SIGKILL)
