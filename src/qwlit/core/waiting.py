"""Network calls with a time limit."""

from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Thread
from typing import Any

PROBE_SECONDS = 6.0


def call_with_timeout(seconds: float, call: Callable[[], Any]) -> None:
    """Run `call` for at most `seconds`: a client's own time-out holds for each address that it tries, not in total.

    Raises:
        TimeoutError: the call took longer.
        Exception: whatever `call` raises.
    """
    outcome: Future[None] = Future()

    def run() -> None:
        try:
            call()
            outcome.set_result(None)
        except Exception as error:
            outcome.set_exception(error)

    # Not a thread pool: at its exit the interpreter would wait for a pool's thread, however long the call takes.
    Thread(target=run, daemon=True).start()
    if not wait([outcome], timeout=seconds).done:
        raise TimeoutError(f"no answer within {seconds:g} s")
    outcome.result()
