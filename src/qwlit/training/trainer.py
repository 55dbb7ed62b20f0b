"""The Lightning Trainer as qwlit uses it: one epoch is the whole run, one batch is one step."""

import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from subprocess import Popen
from threading import Thread
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, ParallelStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from qwlit.core.errors import ConfigError, QwlitError
from qwlit.core.ranks import launched_by_srun, launched_by_torchrun
from qwlit.core.signals import HANDLED_SIGNALS
from qwlit.training.checkpointing.checkpoint import StepFolderIO, read_checkpoint, write_checkpoint
from qwlit.training.machine import Machine
from qwlit.training.resilience.hang_watchdog import REPORT_SECONDS


def build_trainer(
    machine: Machine,
    *,
    total_steps: int,
    callbacks: list[Callback],
    folder: Path,
    record_failure: Callable[[], None] = lambda: None,
) -> Trainer:
    """Build the Trainer; `record_failure` is called when the process must end where nothing can be raised."""
    _quieten_lightning()
    plugins: list[Any] = [] if machine.strategy == "fsdp" else [StepFolderIO()]
    if machine.precision == "16-mixed":
        plugins.append(_autocast_to_float16(machine.accelerator))
    if launched_by_srun():
        # Lightning would save inside the signal handler; `preemption` saves at a step boundary. It would also start
        # ranks of its own in a job that is named "interactive", as salloc's are.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    elif SLURMEnvironment.detect() and not launched_by_torchrun():
        plugins.append(LightningEnvironment())
    trainer = Trainer(
        accelerator="gpu" if machine.accelerator == "cuda" else "cpu",
        devices=machine.devices,
        num_nodes=machine.num_nodes,
        strategy=_strategy(machine, record_failure),
        # The plugin for float16 stands in for the word.
        precision=None if machine.precision == "16-mixed" else machine.precision,
        max_steps=total_steps,
        callbacks=callbacks,
        plugins=plugins,
        default_root_dir=folder,
        # Steps are validated by their absolute number (ScheduleValidation), not by a rhythm of Lightning's.
        check_val_every_n_epoch=None,
        val_check_interval=total_steps,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # Lightning's SIGTERM handler enters a collective from wherever it was; ours are in `preemption`.
    trainer._signal_connector.register_signal_handlers = lambda: None
    return trainer


class _Launcher(_SubprocessScriptLauncher):
    """Starts the other ranks deaf to Ctrl-C, SIGTERM and SIGUSR2 (an ignored signal stays ignored over exec).

    Until they train, rank 0 answers for them. Lightning's observer, which kills all when one has died, is given nothing
    to watch: mostly a collective fails first, and says so in `lost_rank`. Where it hangs, `_watch` ends the job.
    """

    procs: list[Popen[bytes]]

    def __init__(self, cluster_environment: Any, num_processes: int, num_nodes: int) -> None:
        super().__init__(cluster_environment, num_processes, num_nodes)
        self.children: list[Popen[bytes]] = []
        self.record_failure: Callable[[], None] = lambda: None

    def _call_children_scripts(self) -> None:
        previous = {number: signal.signal(number, signal.SIG_IGN) for number in HANDLED_SIGNALS}
        try:
            super()._call_children_scripts()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        self.children, self.procs = self.procs, []
        Thread(target=self._watch, daemon=True).start()

    def kill(self, signum: int) -> None:
        for child in self.children:
            child.send_signal(signum)

    def ends(self) -> dict[int, int]:
        """Return how the ranks started here that did not end well have ended."""
        codes = {rank: child.poll() for rank, child in enumerate(self.children, start=1)}
        return {rank: code for rank, code in codes.items() if code}

    def _watch(self) -> None:
        while not self.ends():
            time.sleep(1.0)
        time.sleep(GRACE_SECONDS)
        ends = self.ends()
        if not ends:
            return  # training is over, and nobody waits for anybody
        lost = LostRank(ends)
        self.record_failure()
        print(f"qwlit: {lost}", file=sys.stderr)
        self.kill(signal.SIGKILL)
        os._exit(lost.exit_code)


class _OwnLauncher(ParallelStrategy):
    record_failure: Callable[[], None]

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if not self.cluster_environment.creates_processes_externally:
            launcher = _Launcher(self.cluster_environment, self.num_processes, self.num_nodes)  # type: ignore[attr-defined]
            launcher.record_failure = self.record_failure
            self._launcher = launcher


class _Replicated(_OwnLauncher, DDPStrategy):
    """Every rank holds everything."""


class _Sharded(_OwnLauncher, ModelParallelStrategy):
    """FSDP2: every rank holds some rows of everything, and writes and reads them itself."""

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}  # the module puts in what is trained

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        state: dict[str, Any] = optimizer.state_dict()
        return state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        write_checkpoint(checkpoint, Path(filepath), rank=self.global_rank, count=self.world_size)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        assert self.lightning_module is not None
        return read_checkpoint(Path(checkpoint_path), dict(self.lightning_module.named_parameters()))

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        (optimizer,), (state,) = self.optimizers, checkpoint["optimizer_states"]
        optimizer.load_state_dict(state)


def _autocast_to_float16(device: str) -> MixedPrecision:
    """Lightning's float16 without its gradient scaler, which would hide from the step what the norm is."""
    precision = MixedPrecision("16-mixed", device)
    precision.scaler = None
    return precision


# What gloo and NCCL say when the process at the other end is gone.
LOST_PEER = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "remote process exited",
    "Timed out waiting",
    "timed out",
)
LAUNCHER_SECONDS = 1.0
# A collective whose peer is gone mostly fails at once; NCCL's may wait for its own time-out of many minutes.
GRACE_SECONDS = 20.0


class LostRank(QwlitError):
    """Another rank has ended, and this one was waiting for it."""

    def __init__(self, ends: dict[int, int]) -> None:
        named = ", ".join(f"rank {rank} ended with {_end(code)}" for rank, code in ends.items())
        # A rank that found the settings or the data wrong has said so itself.
        found_fault = ConfigError.exit_code in ends.values()
        self.exit_code = ConfigError.exit_code if found_fault else QwlitError.exit_code
        remedy = "its own line says why" if found_fault else "the same command goes on from the newest checkpoint"
        super().__init__(f"lost another rank: {named or 'see what the others say'}; {remedy}")


def lost_rank(trainer: Trainer, error: RuntimeError) -> LostRank | None:
    """Return what to say when a collective failed because another rank has ended, None for any other failure."""
    if trainer.world_size == 1 or not any(words in str(error) for words in LOST_PEER):
        return None
    # torchrun asks this one to leave as well, but that is not what happened.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(LAUNCHER_SECONDS)  # until the system knows how the process ended
    launcher = trainer.strategy.launcher
    return LostRank(launcher.ends() if isinstance(launcher, _Launcher) else {})


def _end(code: int) -> str:
    return f"signal {-code}" + (" (out of memory?)" if code == -signal.SIGKILL else "") if code < 0 else f"code {code}"


def stop_watching_ranks(trainer: Trainer) -> None:
    """Let the ranks that this process has started end as they like: training is over."""
    if isinstance(trainer.strategy.launcher, _Launcher):
        trainer.strategy.launcher.children = []


def kill_started_ranks(trainer: Trainer) -> None:
    """End the ranks that this process has started: what they would still say is of no use."""
    if isinstance(trainer.strategy.launcher, _Launcher):
        trainer.strategy.launcher.kill(signal.SIGKILL)


def _strategy(machine: Machine, record_failure: Callable[[], None]) -> Any:
    if machine.strategy == "single":
        return "auto"
    group: dict[str, Any] = {
        "process_group_backend": "nccl" if machine.accelerator == "cuda" else "gloo",
        # Who is missing, `stalls` knows and says before the group gives up.
        "timeout": timedelta(seconds=machine.timeout_seconds + REPORT_SECONDS),
    }
    strategy = (
        _Sharded(data_parallel_size=machine.world_size, tensor_parallel_size=1, **group)
        if machine.strategy == "fsdp"
        else _Replicated(broadcast_buffers=False, gradient_as_bucket_view=True, **group)
    )
    strategy.record_failure = record_failure
    return strategy


def _quieten_lightning() -> None:
    """Keep Lightning's banners and the advice that does not hold for this loop off the screen."""
    # bitsandbytes misses an optional CPU kernel that nothing here uses.
    for name in ("lightning.pytorch", "lightning.fabric", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        # Its successor is not in torch 2.11; the module has reduced val/loss over the ranks when it logs it.
        ".*`broadcast_buffers` is deprecated.*",
        ".*It is recommended to use `self.log.*sync_dist=True.*",
        ".*does not have many workers.*",
        ".*You defined a `validation_step` but have no `val_dataloader`.*",
        ".*dataloader is not resumable.*",
        ".*The `srun` command is available.*",
        ".*`isinstance.treespec, LeafSpec.` is deprecated.*",
    ):
        warnings.filterwarnings("ignore", message=message)
