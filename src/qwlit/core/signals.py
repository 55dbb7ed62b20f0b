"""How a process answers Ctrl-C and signals: one state machine, from the first import to the exit code.

SIGHUP: the terminal is closed.
SIGTERM: the scheduler needs the machine, or, in a trial of a W&B sweep, the sweep ends the trial.
SIGUSR2: Slurm's time limit is near; the process asks for a requeue. (SIGUSR1 would collide with NCCL.)

There is one handler, `_handle`. `Phase` says what it does with these three, in order of time. Ctrl-C raises Python's
KeyboardInterrupt, except for the first one in the steps, which the handler records. Outside of the steps a rank that
srun or rank 0 has started leaves Ctrl-C, which reaches every process of a terminal, to rank 0.

A signal that a process ignores from its start (nohup, or `&` in a script) stays ignored.
"""

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum, auto
from types import FrameType

from qwlit.core.errors import Preempted, Pruned, SignalExit
from qwlit.core.ranks import is_rank_zero, launched_by_srun, launched_by_torchrun, under_agent

EXIT_SIGNALS = (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR2)
BY_URGENCY = (0, signal.SIGINT, *EXIT_SIGNALS)
"""No signal, then the handled signals, least urgent first: Slurm sends SIGTERM after SIGUSR2, and SIGUSR2 must win."""
HANDLED_SIGNALS = BY_URGENCY[1:]
FROM_TERMINAL = (signal.SIGINT, signal.SIGHUP)
Handler = Callable[[int, FrameType | None], None] | signal.Handlers


class Phase(Enum):
    """What the process does now."""

    OUTSIDE_RUN = auto()
    """The subcommand is imported, or only the exit code is left: the handler records the signal. If the run is still
    to come, `answering_signals` acts on it."""
    OUTSIDE_STEPS = auto()
    """The run starts or finishes, and there is nothing to save: the process ends at once, see `answering_signals`."""
    IN_STEPS = auto()
    """The handler records the signal; at the next step boundary `preemption.StopOnSignal` saves and ends the run."""
    ENDING = auto()
    """The process is already ending with an error: the handler records the signal, and no code acts on it."""


_phase = Phase.OUTSIDE_RUN
received_signals: list[int] = []
"""The signals that this process has received and not yet acted on."""


def record_signals() -> None:
    """Record signals from now on: importing takes seconds, and by default these signals kill the process.

    Of torchrun's ranks, only rank 0 records them: it says how the run ended, and the others may end at once.
    """
    if launched_by_torchrun() and not is_rank_zero():
        return
    for signum in EXIT_SIGNALS:
        if signal.getsignal(signum) == signal.SIG_DFL:
            signal.signal(signum, _handle)


def enter_phase(phase: Phase) -> None:
    global _phase  # noqa: PLW0603 - it is true of the whole process
    _phase = phase


@contextmanager
def answering_signals() -> Iterator[None]:
    """Let a signal end the process while the block runs: rank 0 at once, as preempted or pruned.

    - Ranks that rank 0 has started ignore all signals, because rank 0 handles them.
    - Ranks that torchrun or the user has started exit at once: torchrun then gives rank 0 time to exit as well.
    - Ranks that srun has started record their first signal, because srun would kill rank 0 before it can requeue the
      job. If rank 0 got none, all ranks exit together at the first step boundary. If rank 0 got one, it has exited, and
      srun ends the others.
    """
    answered = [signum for signum in EXIT_SIGNALS if signal.getsignal(signum) != signal.SIG_IGN]
    ignored = [] if _answers_itself() else [signal.SIGINT]
    try:
        with handling(answered, _handle), handling(ignored, signal.SIG_IGN):
            enter_phase(Phase.OUTSIDE_STEPS)
            # Signals that arrived while Python was importing.
            if received_signals and (_answers_itself() or signal.SIGTERM in received_signals):
                _exit(most_urgent(received_signals))
            yield
    except SignalExit as end:
        raise end.error from None
    finally:
        enter_phase(Phase.OUTSIDE_RUN)
        received_signals.clear()


@contextmanager
def recording_signals() -> Iterator[None]:
    """Record signals while the steps run, on every rank: `StopOnSignal` reads them. For use in `answering_signals`."""
    # Ranks that rank 0 has started ignore signals until here. What a terminal sends reaches rank 0 too.
    kept = HANDLED_SIGNALS if is_rank_zero() else FROM_TERMINAL
    recorded = [s for s in HANDLED_SIGNALS if s not in kept or signal.getsignal(s) != signal.SIG_IGN]
    with handling(recorded, _handle):
        enter_phase(Phase.IN_STEPS)
        yield
        if _phase is Phase.IN_STEPS:
            enter_phase(Phase.OUTSIDE_STEPS)


@contextmanager
def handling(signums: Iterable[int], handler: Handler) -> Iterator[None]:
    """Let `handler` handle these signals while the block runs."""
    previous = {signum: signal.signal(signum, handler) for signum in signums}
    try:
        yield
    finally:
        for signum, earlier in previous.items():
            signal.signal(signum, earlier)


def _handle(signum: int, frame: FrameType | None) -> None:
    """The signal handler of all phases."""
    is_first = not received_signals
    received_signals.append(signum)
    if signum == signal.SIGINT:
        # A second Ctrl-C must stop at once, without a save.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    elif _phase is Phase.OUTSIDE_STEPS and (_answers_itself() or (signum == signal.SIGTERM and not is_first)):
        _exit(signum)


def _answers_itself() -> bool:
    """Whether this process ends at its first signal outside the steps: see `answering_signals`."""
    return is_rank_zero() or not launched_by_srun()


def _exit(signum: int) -> None:
    """End the process with the error that the signal stands for.

    Python drops an exception that a handler raises inside a finalizer; then StopOnSignal finds the recorded signal.
    """
    # A second signal must not replace this error while it unwinds the stack.
    enter_phase(Phase.ENDING)
    if not is_rank_zero():
        # At this exit code the launcher ends the ranks that still wait for this one.
        raise SystemExit(Preempted.exit_code)
    if signum == signal.SIGTERM and under_agent():
        raise SignalExit(Pruned("the sweep has ended this trial, outside the training steps"))
    message = "preempted outside the training steps; run the same command to resume from the newest checkpoint"
    raise SignalExit(Preempted(message, requeue=requeue_after(signum)))


def requeue_after(signum: int) -> bool | None:
    """Return `Preempted.requeue` for the signal."""
    if under_agent():
        return False  # the agent starts its trial again
    return True if signum == signal.SIGUSR2 else None


def most_urgent(signums: Iterable[int]) -> int:
    """Return the signal that decides how the run ends; 0 for none."""
    return max(signums, key=BY_URGENCY.index, default=0)


def ignore_signals() -> None:
    """Ignore the handled signals: a rank that rank 0 has started, or a DataLoader's worker, ends when that ends it."""
    for signum in HANDLED_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
