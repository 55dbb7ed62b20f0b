"""The Lightning strategies of several ranks: DDP and FSDP2, with qwlit's launcher, meeting and checkpoints."""

import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, ParallelStrategy

from qwlit.core.errors import ConfigError, first_line
from qwlit.core.ranks import started_by_rank_zero, unset_hint
from qwlit.core.streams import say
from qwlit.core.waiting import NOTICE_SECONDS, call_with_timeout
from qwlit.training.checkpointing.checkpoint import Ranks, read_checkpoint
from qwlit.training.checkpointing.writer import CheckpointWriter
from qwlit.training.machine import Machine
from qwlit.training.rank_launcher import RankLauncher
from qwlit.training.resilience.hang_watchdog import REPORT_SECONDS


def build_strategy(machine: Machine, record_failure: Callable[[], None], writer: CheckpointWriter) -> Any:
    """Return Lightning's argument `strategy`; a thread calls `record_failure` before it ends the process."""
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
    if machine.strategy == "fsdp":
        strategy.moments_to_host = machine.offload_optimizer
    return strategy


class _WithRankLauncher(ParallelStrategy):
    """A strategy with the launcher above. Its ranks meet with a time limit, and answer signals while they wait."""

    record_failure: Callable[[], None]
    meeting_seconds: float
    """How long a rank waits for the other ranks."""
    writer: CheckpointWriter

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if not self.cluster_environment.creates_processes_externally:
            launcher = RankLauncher(self.cluster_environment, self.num_processes, self.num_nodes)  # type: ignore[attr-defined]
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
        by_qwlit = started_by_rank_zero() or isinstance(self._launcher, RankLauncher)
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


class _Replicated(_WithRankLauncher, DDPStrategy):
    """DDP: every rank holds all weights, gradients and moments."""


class _Sharded(_WithRankLauncher, ModelParallelStrategy):
    """FSDP2: every rank holds shard slices of all tensors, and writes and reads its own.

    Lightning would gather the whole state dictionary on rank 0, or write torch's sharded format. These methods replace
    both: the module adds its trained parameters, and the writer writes each rank's slices.
    """

    moments_to_host: bool
    """Whether the optimizer steps on the host."""

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
        return read_checkpoint(Path(checkpoint_path), template, Ranks.all(), moments_to_host=self.moments_to_host)

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        (optimizer,), (state,) = self.optimizers, checkpoint["optimizer_states"]
        optimizer.load_state_dict(state)
