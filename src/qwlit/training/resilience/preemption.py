"""Ctrl-C, SIGTERM and SIGUSR2: the handler only notes the signal; at the next step boundary all ranks save and leave.

SIGTERM says that the machine is asked for back; to a trial of a W&B sweep, that the sweep has seen enough of it.
SIGUSR2 is Slurm's word that the time is nearly up: the job asks to be requeued. (SIGUSR1 would collide with NCCL.)
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

LEAVE = (signal.SIGTERM, signal.SIGUSR2)


@contextmanager
def answering_signals() -> Iterator[None]:
    """Outside the step loop there is nothing to save: rank 0 leaves at once, as preempted or pruned.

    Ctrl-C goes to every process of a terminal; only rank 0 answers it there, and takes the others with it. Ranks that
    rank 0 has started leave all signals to it. Those that srun or torchrun has started note theirs: if rank 0 was not
    signalled, all leave together at the first step boundary; if it was, it has left, and the launcher tells the others
    once more, by SIGTERM.
    """
    answer = _leave if is_rank_zero() else _note_or_leave
    previous: dict[int, Any] = {
        number: signal.signal(number, answer) for number in LEAVE if signal.getsignal(number) != signal.SIG_IGN
    }
    if not is_rank_zero():
        previous[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        if received_signals and (is_rank_zero() or signal.SIGTERM in received_signals):
            _leave(most_urgent(received_signals), None)
        yield
    except SignalExit as end:
        raise end.error from None
    finally:
        received_signals.clear()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _note_or_leave(number: int, frame: FrameType | None) -> None:
    if received_signals and number == signal.SIGTERM:
        _leave(number, frame)
    record_signal(number, frame)


def _leave(number: int, frame: FrameType | None) -> None:
    # Python drops what a handler raises inside a finalizer.
    record_signal(number, frame)
    # What comes on the way out shall not take this end's place.
    for other in LEAVE:
        if signal.getsignal(other) in (_leave, _note_or_leave):
            signal.signal(other, record_signal)
    if not is_rank_zero():
        # Its launcher is to end those that still wait for it.
        raise SystemExit(Preempted.exit_code)
    if number == signal.SIGTERM and under_agent():
        raise SignalExit(Pruned("the sweep has ended this trial, outside the training steps"))
    said = "preempted outside the training steps; the same command goes on from the newest checkpoint"
    raise SignalExit(Preempted(said, requeue=_requeue(number)))


def _requeue(number: int) -> bool | None:
    """Return what the signal says of a requeue, as `Preempted` has it."""
    if under_agent():
        return False  # the agent hands out its trial again by itself
    return True if number == signal.SIGUSR2 else None


class StopOnSignal(BoundaryCallback):
    """Ends the run cleanly when any rank was signalled.

    The ranks agree by one word a step, exchanged on the host in the background and read a step later.
    """

    def __init__(self, milestones: Milestones, checkpointing: Checkpointing, folder: RunFolder) -> None:
        super().__init__(milestones)
        self._checkpointing = checkpointing
        self._folder = folder
        self._signal = 0
        self._group: dist.ProcessGroup | None = None
        self._word: tuple[Any, Any] | None = None
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: CausalLMModule) -> None:
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")
            # Lightning broadcasts and reads a SIGTERM flag on the device each step; the word below does its work.
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        self._previous = {number: signal.signal(number, self._note) for number in HANDLED_SIGNALS}
        self._signal = most_urgent([self._signal, *received_signals])

    def on_train_end(self, trainer: Trainer, pl_module: CausalLMModule) -> None:
        self._restore()
        if self._signal:
            # It came in the last step or after it: answered as those are that come while the run is finished.
            signal.raise_signal(self._signal)

    def on_exception(self, trainer: Trainer, pl_module: CausalLMModule, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        # A second Ctrl-C stops at once.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._signal = most_urgent([self._signal, number])

    def _agreed(self) -> int:
        """Return the signal all ranks act on now, 0 for none."""
        if self._group is None:
            return self._signal
        number = 0
        if self._word is not None:
            word, work = self._word
            work.wait()
            number = BY_URGENCY[int(word)]
        word = tensor(BY_URGENCY.index(self._signal))
        self._word = (word, dist.all_reduce(word, op=dist.ReduceOp.MAX, group=self._group, async_op=True))
        return number

    def on_step_boundary(self, trainer: Trainer, module: CausalLMModule, step: int) -> None:
        number = self._agreed()
        if not number or step >= self.milestones.total_steps:
            return
        self._checkpointing.save(trainer, step)
        saved = f"saved {self._folder.path} at step {step}"
        if number == signal.SIGTERM and under_agent():
            self._folder.append_event(step, "pruned")
            raise Pruned(f"{saved}; the sweep has ended this trial")
        saved += "; the same command goes on from there"
        if number in LEAVE:
            self._folder.append_event(step, "preempted")
            raise Preempted(saved, requeue=_requeue(number))
        self._folder.append_event(step, "interrupted")
        raise Interrupted(saved)
