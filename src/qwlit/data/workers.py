"""A function applied to batches on all cores, the results in order."""

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

from qwlit.core.errors import DataError
from qwlit.core.ranks import die_with_parent
from qwlit.core.signals import ignore_signals

SIGNAL_SECONDS = 0.5
Item = TypeVar("Item")
Result = TypeVar("Result")
_function: Callable[[Any], Any]


def num_cores() -> int:
    """Return how many cores this process may use; Slurm and containers give fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], num_workers: int
) -> Generator[Result, None, None]:
    """Yield `function(item)` for each item, in order; at most two items a worker wait at a time.

    Raises:
        DataError: a worker was killed, which mostly means that memory ran out.
    """
    if num_workers <= 1:
        yield from map(function, items)
        return
    # Not fork: the threads of torch and of the tokenizer do not survive it.
    pool = ProcessPoolExecutor(num_workers, get_context("spawn"), _start, (function, os.getpid()))
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(_apply, item))
            if len(waiting) > 2 * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        # A signal to the whole job kills workers too; let this process answer it first.
        time.sleep(SIGNAL_SECONDS)
        raise DataError("a process that tokenizes was killed; is there memory enough?") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(function: Callable[[Any], Any], parent: int) -> None:
    global _function  # noqa: PLW0603 - sent once to each process instead of with each item
    ignore_signals()
    # The pool's own way to end them.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent(parent)
    # One core each.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _function = function


def _apply(item: Any) -> Any:
    return _function(item)
