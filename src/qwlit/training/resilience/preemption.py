"""Save and end the run at a step boundary after Ctrl-C or a signal; `core/signals.py` has the other phases."""

import signal
from contextlib import ExitStack
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import tensor

from qwlit.core import signals
from qwlit.core.errors import Interrupted, Preempted, Pruned
from qwlit.core.ranks import under_agent
from qwlit.training.checkpointing.saving import Checkpointing
from qwlit.training.milestones import Milestones
from qwlit.training.module import CausalLMModule
from qwlit.training.step_boundary import BoundaryCallback
from qwlit.training.tracking.run_folder import RunFolder


class StopOnSignal(BoundaryCallback):
    """Saves and ends the run at a step boundary when any rank has received a signal.

    All ranks must stop at the same step. At every boundary each rank starts an all-reduce (maximum) of its signal, on
    the host and in the background, and reads the result of the boundary before.
    """

    def __init__(self, milestones: Milestones, checkpointing: Checkpointing, folder: RunFolder) -> None:
        super().__init__(milestones)
        self._checkpointing = checkpointing
        self._folder = folder
        self._group: dist.ProcessGroup | None = None
        self._signal_exchange: tuple[Any, Any] | None = None
        """The all-reduce that the last boundary started: its tensor, and its handle to wait for."""
        self._recording = ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: CausalLMModule) -> None:
        if trainer.world_size > 1:
            # A gloo group of its own: its all-reduce runs on the host and cannot mix with the gradients' collectives.
            # All ranks call on_train_start, so all of them create the group.
            self._group = dist.new_group(backend="gloo")
            # Lightning broadcasts and reads a SIGTERM flag on the device at each step; `_signal_exchange` replaces it.
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        self._recording.enter_context(signals.recording_signals())

    def on_train_end(self, trainer: Trainer, pl_module: CausalLMModule) -> None:
        self._recording.close()
        signum = signals.most_urgent(signals.received_signals)
        signals.received_signals.clear()
        if signum:
            # It came too late for a step boundary: act on it as on a signal that arrives now, outside the steps.
            signal.raise_signal(signum)

    def on_exception(self, trainer: Trainer, pl_module: CausalLMModule, exception: BaseException) -> None:
        self._recording.close()

    def _exchange_signals(self) -> int:
        """Return the most urgent signal of any rank at the boundary before, 0 for none; start the next exchange."""
        own = signals.most_urgent(signals.received_signals)
        if self._group is None:
            return own
        signum = 0
        if self._signal_exchange is not None:
            urgency, work = self._signal_exchange
            # The exchange ran during the step, so this rarely waits.
            work.wait()
            signum = signals.BY_URGENCY[int(urgency)]
        urgency = tensor(signals.BY_URGENCY.index(own))
        work = dist.all_reduce(urgency, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._signal_exchange = (urgency, work)
        return signum

    def on_step_boundary(self, trainer: Trainer, module: CausalLMModule, step: int) -> None:
        # A collective: every rank calls it at every boundary, whether or not it has a signal.
        signum = self._exchange_signals()
        # After the last step `on_train_end` acts on the signal.
        if not signum or step >= self.milestones.total_steps:
            return
        # `signum` is the same on all ranks, so all of them save, which is a collective too.
        saved = self._checkpointing.save_before_exit(trainer, step)
        if signum == signal.SIGINT:
            self._folder.append_event(step, "interrupted")
            raise Interrupted(f"{saved}; run the same command to resume")
        # The agent and W&B's server may each send a SIGTERM, and Slurm one after its SIGUSR2.
        signals.enter_phase(signals.Phase.ENDING)
        if signum == signal.SIGTERM and under_agent():
            self._folder.append_event(step, "pruned")
            raise Pruned(f"{saved}; the sweep has ended this trial")
        self._folder.append_event(step, "preempted")
        raise Preempted(f"{saved}; run the same command to resume", requeue=signals.requeue_after(signum))
