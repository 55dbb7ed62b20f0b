"""Ctrl-C and SIGTERM: the handler only notes the signal; at the next step boundary all ranks save and leave."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import tensor

from qwlit.core.errors import Interrupted, Preempted
from qwlit.core.ranks import is_rank_zero
from qwlit.training.boundary import BoundaryCallback
from qwlit.training.checkpoint import Checkpointing
from qwlit.training.milestones import Milestones
from qwlit.training.module import CausalLMModule
from qwlit.training.run_folder import RunFolder

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def answering_signals() -> Iterator[None]:
    """Outside the step loop there is nothing to save: SIGTERM ends the process as preempted.

    Ctrl-C goes to every process of a terminal; only rank 0 answers it there, and takes the others with it. Ranks that
    rank 0 has started leave SIGTERM to it as well.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise Preempted("preempted outside the training steps; the same command goes on from the newest checkpoint")

    previous = {}
    if signal.getsignal(signal.SIGTERM) != signal.SIG_IGN:
        previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, leave)
    if not is_rank_zero():
        previous[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


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
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}

    def on_train_end(self, trainer: Trainer, pl_module: CausalLMModule) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: CausalLMModule, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        # A second Ctrl-C stops at once.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._signal = max(self._signal, number)

    def _agreed(self) -> int:
        """Return the signal all ranks act on now, 0 for none."""
        if self._group is None:
            return self._signal
        number = 0
        if self._word is not None:
            word, work = self._word
            work.wait()
            number = int(word)
        word = tensor(self._signal)
        self._word = (word, dist.all_reduce(word, op=dist.ReduceOp.MAX, group=self._group, async_op=True))
        return number

    def on_step_boundary(self, trainer: Trainer, module: CausalLMModule, step: int) -> None:
        number = self._agreed()
        if not number or step >= self.milestones.total_steps:
            return
        self._checkpointing.save(trainer, step)
        preempted = number == signal.SIGTERM
        self._folder.append_event(step, "preempted" if preempted else "interrupted")
        error = Preempted if preempted else Interrupted
        raise error(f"saved {self._folder.path} at step {step}; the same command goes on from there")
