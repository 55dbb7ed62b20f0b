"""Apply a function to batches in several processes, and return the results in order."""

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
    """Return how many cores this process may use; Slurm and containers may allow fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], num_workers: int
) -> Generator[Result, None, None]:
    """Yield `function(item)` for each item, in order. At most two items per worker wait, to limit memory.

    Raises:
        DataError: a worker was killed, usually because memory ran out.
    """
    if num_workers <= 1:
        yield from map(function, items)
        return
    # Not fork: a forked child has no copies of the threads of torch and of the tokenizer, and can hang.
    pool = ProcessPoolExecutor(num_workers, get_context("spawn"), _start_worker, (function, os.getpid()))
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(_apply, item))
            if len(waiting) > 2 * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        # A signal to the whole job kills workers too: wait, so that this process can handle the signal first.
        time.sleep(SIGNAL_SECONDS)
        raise DataError("a tokenizing process was killed; is there enough memory?") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(function: Callable[[Any], Any], parent: int) -> None:
    global _function  # noqa: PLW0603 - sent once to each process instead of with each item
    ignore_signals()
    # The pool ends its workers with SIGTERM.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent(parent)
    # There is one worker per core, so each must use only one.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _function = function


def _apply(item: Any) -> Any:
    return _function(item)
