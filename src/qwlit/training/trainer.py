"""Build the Lightning Trainer, for which one epoch is the whole run and one batch is one step."""

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment

from qwlit.core.ranks import ADDRESS, launched_by_srun, launched_by_torchrun, launched_world_size
from qwlit.training.checkpointing.writer import CheckpointWriter
from qwlit.training.machine import Machine
from qwlit.training.strategies import build_strategy


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
        strategy=build_strategy(machine, record_failure, writer),
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


def _autocast_to_float16(device: str) -> MixedPrecision:
    """Return Lightning's float16 plugin without its gradient scaler: qwlit needs the norm of the unscaled gradients."""
    precision = MixedPrecision("16-mixed", device)
    precision.scaler = None
    return precision


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
