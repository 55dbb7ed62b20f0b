"""Build the Lightning Trainer, for which one epoch is the whole run and one batch is one step; detect lost ranks."""

import contextlib
import logging
import os
import signal
import socket
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from subprocess import Popen
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, ParallelStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from qwlit.core.errors import ConfigError, QwlitError, first_line
from qwlit.core.ranks import (
    ADDRESS,
    launched_by_srun,
    launched_by_torchrun,
    launched_world_size,
    started_by_rank_zero,
    unset_hint,
)
from qwlit.core.signals import Phase, enter_phase, handling
from qwlit.core.streams import say
from qwlit.core.waiting import NOTICE_SECONDS, call_with_timeout
from qwlit.training.checkpointing.checkpoint import Ranks, read_checkpoint
from qwlit.training.checkpointing.writer import CheckpointWriter
from qwlit.training.machine import Machine
from qwlit.training.resilience.hang_watchdog import REPORT_SECONDS


def build_trainer(
    machine: Machine,
    *,
    total_steps: int,
    callbacks: list[Callback],
    folder: Path,
    loggers: Sequence[Logger] = (),
    writer: CheckpointWriter | None = None,
    record_failure: Callable[[], None] = lambda: None,
) -> Trainer:
    """Build the Trainer; a background thread calls `record_failure` before it ends the process."""
    writer = writer or CheckpointWriter()
    _quieten_lightning()
    if launched_world_size() is None and machine.num_nodes == 1 and "LOCAL_RANK" not in os.environ:
        # This process starts all ranks, so they meet on this machine at a free port, wherever other programs meet.
        for name in ADDRESS:
            os.environ.pop(name, None)
    plugins: list[Any] = [] if machine.strategy == "fsdp" else [writer]
    if machine.precision == "16-mixed":
        plugins.append(_autocast_to_float16(machine.accelerator))
    if launched_by_srun():
        # With auto_requeue Lightning saves inside its signal handler; `preemption` saves at a step boundary. Without
        # this plugin Lightning would also start ranks itself in a job named "interactive", as salloc names its jobs.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    elif SLURMEnvironment.detect() and not launched_by_torchrun():
        plugins.append(LightningEnvironment())
    trainer = Trainer(
        accelerator="gpu" if machine.accelerator == "cuda" else "cpu",
        devices=machine.devices,
        num_nodes=machine.num_nodes,
        strategy=_strategy(machine, record_failure, writer),
        # For float16 the plugin above sets the precision; Lightning accepts only one of the two.
        precision=None if machine.precision == "16-mixed" else machine.precision,
        max_steps=total_steps,
        callbacks=callbacks,
        plugins=plugins,
        default_root_dir=folder,
        # ScheduleValidation validates at absolute step numbers; these two settings switch Lightning's own schedule off.
        check_val_every_n_epoch=None,
        val_check_interval=total_steps,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=list(loggers),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # Lightning's SIGTERM handler calls a collective inside the handler. `preemption` installs the handlers instead.
    trainer._signal_connector.register_signal_handlers = lambda: None
    return trainer


class _Launcher(_SubprocessScriptLauncher):
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


class _OwnLauncher(ParallelStrategy):
    """A strategy with the launcher above. Its ranks meet with a time limit, and answer signals while they wait."""

    record_failure: Callable[[], None]
    meeting_seconds: float
    """How long a rank waits for the other ranks."""
    writer: CheckpointWriter

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if not self.cluster_environment.creates_processes_externally:
            launcher = _Launcher(self.cluster_environment, self.num_processes, self.num_nodes)  # type: ignore[attr-defined]
            launcher.record_failure = self.record_failure
            self._launcher = launcher

    def setup_environment(self) -> None:
        """Join the process group before Lightning does, which then leaves it as it is.

        Raises:
            ConfigError: the ranks cannot meet at this address, for example because the port is taken, or not all came
                in time.
        """
        cluster = self.cluster_environment
        assert cluster is not None
        if dist.is_initialized():
            # An earlier training in this process has joined it.
            super().setup_environment()
            return
        self.set_world_ranks()  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = cluster.main_address, str(cluster.main_port)
        address = f"{cluster.main_address}:{cluster.main_port} (MASTER_ADDR, MASTER_PORT)"
        # The launcher sets LOCAL_RANK in its own process too, so Lightning takes all ranks for started by others.
        by_qwlit = started_by_rank_zero() or isinstance(self._launcher, _Launcher)
        hint = "" if by_qwlit else unset_hint()

        def notify() -> None:
            if self.global_rank == 0 or hint:
                say(f"qwlit: rank {self.global_rank} of {self.world_size} waits for other ranks at {address}{hint}")

        try:
            call_with_timeout(self.meeting_seconds, self._join, notice_after=NOTICE_SECONDS, notice=notify)
        except TimeoutError:
            raise ConfigError(
                f"rank {self.global_rank}: not all {self.world_size} ranks met at {address} within"
                f" {self.meeting_seconds:g} s (hardware.timeout_seconds){hint}"
            ) from None
        except dist.DistNetworkError as error:
            taken = "the port is taken; set another MASTER_PORT" if "EADDRINUSE" in str(error) else first_line(error)
            raise ConfigError(f"the ranks cannot meet at {address}: {taken}") from None
        super().setup_environment()

    def _join(self) -> None:
        """Join the process group, in a thread of its own."""
        _look_up(os.environ["MASTER_ADDR"])
        device = self.root_device if self.root_device.type == "cuda" else None
        if device is not None:
            torch.cuda.set_device(device)
        dist.init_process_group(
            self._process_group_backend,  # type: ignore[attr-defined]
            rank=self.global_rank,
            world_size=self.world_size,
            timeout=self._timeout,  # type: ignore[attr-defined]
            device_id=device,
        )


# In a cluster the name of a node may be known only some time after its process has started.
LOOK_UP_SECONDS = 10.0


def _look_up(host: str) -> None:
    """Wait until the host name can be looked up: torch would try for as long as the ranks wait for each other.

    Raises:
        ConfigError: it cannot within LOOK_UP_SECONDS.
    """
    end = time.monotonic() + LOOK_UP_SECONDS
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() > end:
                raise ConfigError(
                    f"MASTER_ADDR={host}: {socket.gethostname()} cannot look up this host name ({first_line(error)});"
                    " set MASTER_ADDR to a name or an IP address of rank 0's node that all nodes can look up"
                ) from None
        time.sleep(LOOK_UP_SECONDS / 20)


class _Replicated(_OwnLauncher, DDPStrategy):
    """DDP: every rank holds all weights, gradients and moments."""


class _Sharded(_OwnLauncher, ModelParallelStrategy):
    """FSDP2: every rank holds shard slices of all tensors, and writes and reads its own.

    Lightning would gather the whole state dictionary on rank 0, or write torch's sharded format. These methods replace
    both: the module adds its trained parameters, and the writer writes each rank's slices.
    """

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}  # CausalLMModule.on_save_checkpoint adds the trained parameters

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        state: dict[str, Any] = optimizer.state_dict()
        return state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        self.writer.save_checkpoint(checkpoint, filepath)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        assert self.lightning_module is not None
        template = dict(self.lightning_module.named_parameters())
        return read_checkpoint(Path(checkpoint_path), template, Ranks.all())

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        (optimizer,), (state,) = self.optimizers, checkpoint["optimizer_states"]
        optimizer.load_state_dict(state)


def _autocast_to_float16(device: str) -> MixedPrecision:
    """Return Lightning's float16 plugin without its gradient scaler: qwlit needs the norm of the unscaled gradients."""
    precision = MixedPrecision("16-mixed", device)
    precision.scaler = None
    return precision


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
    return LostRank(launcher.failed_ranks() if isinstance(launcher, _Launcher) else {})


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"code {code}"
    return f"signal {-code}" + (" (out of memory?)" if code == -signal.SIGKILL else "")


def share_launcher(trainer: Trainer, earlier: Any) -> Any:
    """Return the launcher that started the ranks of this process; a later trainer of the run watches the same ranks.

    Args:
        earlier: the launcher of the run's first trainer; None where this is the first.
    """
    if isinstance(earlier, _Launcher):
        trainer.strategy._launcher = earlier
    return trainer.strategy.launcher


def stop_watching_ranks(trainer: Trainer) -> None:
    """Stop watching the ranks that this process has started: the training is over, and they may end."""
    if isinstance(trainer.strategy.launcher, _Launcher):
        trainer.strategy.launcher.children = []


def kill_started_ranks(trainer: Trainer) -> None:
    """Kill the ranks that this process has started: the run has ended, and they would wait or add follow-up errors."""
    if isinstance(trainer.strategy.launcher, _Launcher):
        trainer.strategy.launcher.kill(signal.SIGKILL)


def _strategy(machine: Machine, record_failure: Callable[[], None], writer: CheckpointWriter) -> Any:
    if machine.strategy == "single":
        return "auto"
    group: dict[str, Any] = {
        "process_group_backend": "nccl" if machine.accelerator == "cuda" else "gloo",
        # Longer than hang_watchdog's time-out, so that it can name the missing rank before the group's own error.
        "timeout": timedelta(seconds=machine.timeout_seconds + REPORT_SECONDS),
    }
    strategy = (
        _Sharded(data_parallel_size=machine.world_size, tensor_parallel_size=1, **group)
        if machine.strategy == "fsdp"
        else _Replicated(broadcast_buffers=False, gradient_as_bucket_view=True, **group)
    )
    strategy.record_failure = record_failure
    strategy.meeting_seconds = machine.timeout_seconds
    strategy.writer = writer
    return strategy


def _quieten_lightning() -> None:
    """Silence Lightning's banners, and its advice that does not apply to this trainer."""
    # bitsandbytes warns about a missing CPU kernel that qwlit does not use.
    for name in ("lightning.pytorch", "lightning.fabric", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        # torch 2.11 does not have the replacement yet. For the next one: the module reduces val/loss before it logs it.
        ".*`broadcast_buffers` is deprecated.*",
        ".*It is recommended to use `self.log.*sync_dist=True.*",
        ".*does not have many workers.*",
        ".*You defined a `validation_step` but have no `val_dataloader`.*",
        ".*dataloader is not resumable.*",
        ".*is smaller than the logging interval.*",
        # StepDataModule gives an empty list where the run has no validation set.
        ".*Total length of `list` across ranks is zero.*",
        ".*The `srun` command is available.*",
        ".*`isinstance.treespec, LeafSpec.` is deprecated.*",
    ):
        warnings.filterwarnings("ignore", message=message)
