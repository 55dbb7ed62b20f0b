"""Asking the network something without waiting for its time-outs."""

from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

PROBE_SECONDS = 6.0


def call_with_timeout(seconds: float, call: Callable[[], Any]) -> None:
    """Run `call`, whose own time-out holds for each address it tries, and let it take `seconds` at most.

    Raises:
        TimeoutError: it took longer; or whatever `call` raises.
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
