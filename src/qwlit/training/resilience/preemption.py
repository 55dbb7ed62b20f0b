"""Ctrl-C, SIGTERM and SIGUSR2: the handler only records the signal; at the next step boundary all ranks save and exit.

SIGTERM: the scheduler needs the machine, or, in a trial of a W&B sweep, the sweep ends the trial.
SIGUSR2: Slurm's time limit is near; the process asks for a requeue. (SIGUSR1 would collide with NCCL.)

The handlers of one process, in order of time:
1. while `__main__` imports the subcommand: `record_signal`;
2. while the run starts and finishes (`answering_signals`): rank 0 exits at once, because there is nothing to save;
3. during the steps (`StopOnSignal`): `_on_signal` records, and `on_step_boundary` saves and raises;
4. while the process exits: `record_signal` again, so that no later signal changes how it ends.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import tensor

from qwlit.core.errors import Interrupted, Preempted, Pruned, SignalExit
from qwlit.core.ranks import is_rank_zero, under_agent
from qwlit.core.signals import BY_URGENCY, HANDLED_SIGNALS, most_urgent, received_signals, record_signal
from qwlit.training.checkpointing.checkpoint import Checkpointing
from qwlit.training.milestones import Milestones
from qwlit.training.module import CausalLMModule
from qwlit.training.step_boundary import BoundaryCallback
from qwlit.training.tracking.run_folder import RunFolder

EXIT_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


@contextmanager
def answering_signals() -> Iterator[None]:
    """Handle signals outside the steps, where there is nothing to save: rank 0 exits at once, as preempted or pruned.

    - Ctrl-C reaches every process of the terminal. Rank 0 handles it and ends the others, so the others ignore it.
    - Ranks that rank 0 has started ignore all signals, because rank 0 handles them.
    - Ranks that srun or torchrun has started record their first signal. If rank 0 got none, all ranks exit together at
      the first step boundary. If rank 0 got one, it has exited, and the launcher sends the others a SIGTERM: they exit.
    """
    handler = _exit_on_signal if is_rank_zero() else _record_or_exit
    # An ignored signal stays ignored: this rank was started by rank 0.
    previous: dict[int, Any] = {
        number: signal.signal(number, handler) for number in EXIT_SIGNALS if signal.getsignal(number) != signal.SIG_IGN
    }
    if not is_rank_zero():
        previous[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        # Signals that arrived while Python was importing.
        if received_signals and (is_rank_zero() or signal.SIGTERM in received_signals):
            _exit_on_signal(most_urgent(received_signals), None)
        yield
    except SignalExit as end:
        raise end.error from None
    finally:
        received_signals.clear()
        for number, earlier in previous.items():
            signal.signal(number, earlier)


def _record_or_exit(number: int, frame: FrameType | None) -> None:
    """Signal handler of ranks that a launcher started: record the first signal, exit at the SIGTERM that follows."""
    if received_signals and number == signal.SIGTERM:
        _exit_on_signal(number, frame)
    record_signal(number, frame)


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    """Signal handler that ends the process with the error that the signal stands for."""
    # Python drops an exception that a handler raises inside a finalizer; then StopOnSignal finds the recorded signal.
    record_signal(number, frame)
    # From now on only record signals: a second one must not replace this error while it unwinds the stack.
    for other in EXIT_SIGNALS:
        if signal.getsignal(other) in (_exit_on_signal, _record_or_exit):
            signal.signal(other, record_signal)
    if not is_rank_zero():
        # At this exit code the launcher ends the ranks that still wait for this one.
        raise SystemExit(Preempted.exit_code)
    if number == signal.SIGTERM and under_agent():
        raise SignalExit(Pruned("the sweep has ended this trial, outside the training steps"))
    message = "preempted outside the training steps; run the same command to resume from the newest checkpoint"
    raise SignalExit(Preempted(message, requeue=_requeue(number)))


def _requeue(number: int) -> bool | None:
    """Return `Preempted.requeue` for the signal."""
    if under_agent():
        return False  # the agent starts its trial again
    return True if number == signal.SIGUSR2 else None


class StopOnSignal(BoundaryCallback):
    """Saves and ends the run at a step boundary when any rank has received a signal.

    All ranks must stop at the same step. At every boundary each rank starts an all-reduce (maximum) of its signal, on
    the host and in the background, and reads the result of the boundary before.
    """

    def __init__(self, milestones: Milestones, checkpointing: Checkpointing, folder: RunFolder) -> None:
        super().__init__(milestones)
        self._checkpointing = checkpointing
        self._folder = folder
        self._signal = 0
        self._group: dist.ProcessGroup | None = None
        self._signal_exchange: tuple[Any, Any] | None = None
        """The all-reduce that the last boundary started: its tensor, and its handle to wait for."""
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: CausalLMModule) -> None:
        if trainer.world_size > 1:
            # A gloo group of its own: its all-reduce runs on the host and cannot mix with the gradients' collectives.
            # All ranks call on_train_start, so all of them create the group.
            self._group = dist.new_group(backend="gloo")
            # Lightning broadcasts and reads a SIGTERM flag on the device at each step; `_signal_exchange` replaces it.
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        # First the handlers, then the signals recorded before them: so none is lost in between.
        self._previous = {number: signal.signal(number, self._on_signal) for number in HANDLED_SIGNALS}
        self._signal = most_urgent([self._signal, *received_signals])

    def on_train_end(self, trainer: Trainer, pl_module: CausalLMModule) -> None:
        self._restore()
        if self._signal:
            # It came too late for a step boundary: let the handler of `answering_signals` act on it.
            signal.raise_signal(self._signal)

    def on_exception(self, trainer: Trainer, pl_module: CausalLMModule, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # A second Ctrl-C must stop at once, without a save.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._signal = most_urgent([self._signal, number])

    def _exchange_signals(self) -> int:
        """Return the most urgent signal of any rank at the boundary before, 0 for none; start the next exchange."""
        if self._group is None:
            return self._signal
        number = 0
        if self._signal_exchange is not None:
            urgency, work = self._signal_exchange
            # The exchange ran during the step, so this rarely waits.
            work.wait()
            number = BY_URGENCY[int(urgency)]
        urgency = tensor(BY_URGENCY.index(self._signal))
        work = dist.all_reduce(urgency, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._signal_exchange = (urgency, work)
        return number

    def on_step_boundary(self, trainer: Trainer, module: CausalLMModule, step: int) -> None:
        # A collective: every rank calls it at every boundary, whether or not it has a signal.
        number = self._exchange_signals()
        # After the last step `on_train_end` acts on the signal.
        if not number or step >= self.milestones.total_steps:
            return
        # `number` is the same on all ranks, so all of them save, which is a collective too.
        self._checkpointing.save(trainer, step)
        saved = f"saved {self._folder.path} at step {step}"
        if number == signal.SIGTERM and under_agent():
            self._folder.append_event(step, "pruned")
            raise Pruned(f"{saved}; the sweep has ended this trial")
        saved += "; run the same command to resume"
        if number in EXIT_SIGNALS:
            self._folder.append_event(step, "preempted")
            raise Preempted(saved, requeue=_requeue(number))
        self._folder.append_event(step, "interrupted")
        raise Interrupted(saved)
