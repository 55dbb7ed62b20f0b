"""Network calls with a time limit."""

from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

PROBE_SECONDS = 6.0


def call_with_timeout(seconds: float, call: Callable[[], Any]) -> None:
    """Run `call` for at most `seconds`: a client's own time-out holds for each address that it tries, not in total.

    Raises:
        TimeoutError: the call took longer.
        Exception: whatever `call` raises.
    """
    outcome: SimpleQueue[Exception | None] = SimpleQueue()

    def run() -> None:
        try:
            call()
            outcome.put(None)
        except Exception as error:
            outcome.put(error)

    Thread(target=run, daemon=True).start()
    try:
        error = outcome.get(timeout=seconds)
    except Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
