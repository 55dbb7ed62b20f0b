"""The screen: what a person reads goes to stdout, on rank 0 only."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

from qwlit.core.ranks import is_rank_zero

PLAIN_LINE_SECONDS = 5.0


class Screen(Console):
    """A console that training survives: a reader that closes the pipe (`| head`) only makes it quiet."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@cache
def console(*, stderr: bool = False) -> Console:
    """Return the screen; `stderr` where stdout carries what a machine reads."""
    # Without a terminal rich assumes 80 columns and would fold paths and log lines.
    width = None if (sys.stderr if stderr else sys.stdout).isatty() else 200
    return Screen(stderr=stderr, quiet=not is_rank_zero(), width=width, highlight=False, soft_wrap=True)


def progress_bar(label: str, count: ProgressColumn, screen: Console, **options: Any) -> Progress:
    """Return a bar with a text of the task's own beside it; `count` says how far it is, `options` are rich's."""
    columns = (BarColumn(bar_width=12), TextColumn("{task.description}"), TimeRemainingColumn())
    return Progress(TextColumn(label), count, *columns, console=screen, **options)


@contextmanager
def measuring(what: str, screen: Console) -> Iterator[Callable[..., None]]:
    """Show how far a long work is while the block runs: a bar on a terminal, a line now and then elsewhere.

    Yields:
        show(done, in_all, text, *, finished): `in_all` 0 where nobody knows; the finished text stays on the screen.
    """
    bar = progress_bar(what, TaskProgressColumn(), screen, transient=True, disable=not screen.is_terminal)
    last_line = time.monotonic()

    def show(done: int, in_all: int, text: str, *, finished: bool = False) -> None:
        nonlocal last_line
        if finished:
            screen.print(f"{what} done: {text}")
        elif screen.is_terminal:
            task = bar.task_ids[0] if bar.task_ids else bar.add_task("")
            bar.update(task, completed=done, total=in_all or None, description=text)
        elif time.monotonic() - last_line > PLAIN_LINE_SECONDS:
            last_line = time.monotonic()
            screen.print(f"{what}: {done / in_all:.0%}, {text}" if in_all else f"{what}: {text}")

    with bar:
        yield show
