"""Network calls with a time limit."""

import math
from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Thread
from typing import Any

PROBE_SECONDS = 6.0
NOTICE_SECONDS = 20.0
"""After this time a process says that it waits for others. Importing everything takes less, on most machines."""


def call_with_timeout(
    seconds: float,
    call: Callable[[], Any],
    *,
    notice_after: float = math.inf,
    notice: Callable[[], None] = lambda: None,
) -> None:
    """Run `call` for at most `seconds`: a client's own time-out holds for each address that it tries, not in total.

    The main thread stays free to answer signals.

    Args:
        notice_after: call `notice` when `call` has taken this many seconds.

    Raises:
        TimeoutError: the call took longer.
        BaseException: whatever `call` raises.
    """
    outcome: Future[None] = Future()

    def run() -> None:
        try:
            call()
            outcome.set_result(None)
        except BaseException as error:
            # SystemExit too would end the thread without a word, and the caller would wait for the whole time.
            outcome.set_exception(error)

    # Not a thread pool: at its exit the interpreter would wait for a pool's thread, however long the call takes.
    Thread(target=run, daemon=True).start()
    first = min(notice_after, seconds)
    if not wait([outcome], timeout=first).done and first < seconds:
        notice()
    if not wait([outcome], timeout=seconds - first).done:
        raise TimeoutError(f"no answer within {seconds:g} s")
    outcome.result()
