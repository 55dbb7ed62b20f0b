"""The screen: what a person reads goes to stdout, on rank 0 only."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

from rich.console import Console

from qwlit.core.ranks import is_rank_zero

PLAIN_LINE_EVERY = 50_000


class Screen(Console):
    """A console that training survives: a reader that closes the pipe (`| head`) only makes it quiet."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@cache
def console() -> Console:
    # Without a terminal rich assumes 80 columns and would fold paths and log lines.
    width = None if sys.stdout.isatty() else 200
    return Screen(quiet=not is_rank_zero(), width=width, highlight=False, soft_wrap=True)


@contextmanager
def counting(what: str) -> Iterator[Callable[[int], None]]:
    """Show a growing count while the block runs: a live line on a terminal, a line now and then elsewhere."""
    screen = console()
    with screen.status(what) as status:

        def show(count: int) -> None:
            if screen.is_terminal:
                status.update(f"{what} {count:,}")
            elif count % PLAIN_LINE_EVERY == 0:
                screen.print(f"{what} {count:,}")

        yield show
