"""Build module, trainer and callbacks, and train."""

import gc
from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from qwlit.core.errors import ConfigError, GuardStop, QwlitError
from qwlit.core.ranks import mark_process_group_joined
from qwlit.model.compile import failed_to_compile
from qwlit.model.load import fill_causal_lm
from qwlit.model.loss_model import init_adapter
from qwlit.model.shard import is_sharded, shard_model
from qwlit.run.callbacks import TrainerWithCallbacks, build_trainer_with_callbacks
from qwlit.run.diagnosis import try_to_diagnose
from qwlit.run.go_back import go_back
from qwlit.run.modules import build_data_module, build_module
from qwlit.run.out_of_memory import out_of_memory
from qwlit.run.resume import ResumePoint
from qwlit.training.checkpointing.checkpoint import NOT_LOADABLE, not_loadable
from qwlit.training.data_module import StepDataModule
from qwlit.training.module import CausalLMModule
from qwlit.training.rank_launcher import kill_started_ranks, lost_rank, share_launcher, stop_watching_ranks
from qwlit.training.resilience.rollback import RollbackNeeded
from qwlit.training.telemetry import Listener
from qwlit.training.tracking.wandb_run import WandbRun

if TYPE_CHECKING:
    from qwlit.run.training_run import TrainingRun


def fit(
    run: "TrainingRun",
    start: ResumePoint,
    wandb_run: WandbRun | None = None,
    listeners: Sequence[Listener] = (),
) -> TrainerWithCallbacks:
    """Train from `start` to the last step, going back where the guard says so.

    Args:
        listeners: called with each record of metrics.jsonl.

    Returns:
        The trainer and the callbacks that hold results.
    """
    launcher: Any = None
    at_start = [deepcopy(callback.state_dict()) for callback in run.extensions.callbacks]
    while True:
        training = build_trainer_with_callbacks(run, wandb_run, listeners)
        launcher = share_launcher(training.trainer, launcher)
        try:
            _fit(run, training, start)
            return training
        except RollbackNeeded as error:
            # Its frames hold the trainer, and with it moments and gradients.
            needed = error.with_traceback(None)
        del training
        gc.collect()
        start = go_back(run, needed)
        if start.checkpoint is None:
            # Lightning gives the user's callbacks the state of a checkpoint; the start has none.
            for callback, state in zip(run.extensions.callbacks, at_start, strict=True):
                if state:
                    callback.load_state_dict(deepcopy(state))


def _fit(run: "TrainingRun", training: TrainerWithCallbacks, start: ResumePoint) -> None:
    must_shard = run.plan.machine.strategy == "fsdp" and not is_sharded(run.loss_model)
    module = build_module(run.plan, run.loss_model, shard=partial(_shard, run) if must_shard else None)
    if training.trainer.world_size != run.plan.machine.world_size:
        raise ConfigError(
            f"Lightning has {training.trainer.world_size} processes, but hardware.devices x hardware.num_nodes is"
            f" {run.plan.machine.world_size}; start them with torchrun or srun, or let qwlit start them"
        )
    try:
        _run(training, module, build_data_module(run.plan), start)
    except torch.OutOfMemoryError:
        failure = out_of_memory(training.trainer, module, run)
        run.folder.append_event(training.trainer.global_step, "out_of_memory", message=str(failure))
        raise failure from None
    except RollbackNeeded:
        raise
    except GuardStop as error:
        if error.step:
            try_to_diagnose(run, training.trainer, error.step, str(error))
        kill_started_ranks(training.trainer)
        raise
    except Exception as error:
        if not failed_to_compile(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise QwlitError(f"a decoder layer cannot be compiled ({reason}); set hardware.compile=false") from error
    finally:
        run.folder.try_write_summary(**training.results())


def _shard(run: "TrainingRun", mesh: DeviceMesh) -> None:
    """Shard the model and fill in its weights; no rank ever holds more than its own shard slices.

    The order matters: the model is on the meta device until `shard_model` has split it, then each rank reads or draws
    its slices. The adapter comes last: DoRA starts from the base weights, and merging an adapter changes them.
    """
    shard_model(run.loss_model, mesh, bf16=run.plan.machine.precision == "bf16-mixed")
    fill_causal_lm(run.loss_model.causal_lm, run.config.model, seed=run.config.seed)
    init_adapter(run.loss_model.causal_lm, run.config.model)


def _run(training: TrainerWithCallbacks, module: CausalLMModule, data: StepDataModule, start: ResumePoint) -> None:
    """Run the trainer. If anything ends it early, end the ranks that this process started; else leave the group."""
    if training.trainer.world_size > 1:
        mark_process_group_joined()
    try:
        training.trainer.fit(module, datamodule=data, ckpt_path=start.checkpoint, weights_only=True)
    except GuardStop:
        raise  # every rank raises it at the same step, and they go on together
    except BaseException as error:
        failure: QwlitError | None = lost_rank(training.trainer, error)
        kill_started_ranks(training.trainer)
        is_foreign = isinstance(error, NOT_LOADABLE) and not isinstance(error, QwlitError | torch.OutOfMemoryError)
        if failure is None and is_foreign and start.checkpoint and not training.checkpointing.has_begun:
            failure = not_loadable(start.checkpoint, error)
        if failure is not None:
            raise failure from None
        # Outside the steps, and at the second Ctrl-C, Lightning turns KeyboardInterrupt into SystemExit(1).
        if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    stop_watching_ranks(training.trainer)
    if dist.is_initialized():
        # If the group still exists at the interpreter's shutdown, gloo's threads can abort the process.
        dist.destroy_process_group()
