"""The console: rank 0 prints what a person reads to stdout; the other ranks print nothing."""

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
    """A console that becomes quiet when the reader closes the pipe (`| head`): training must continue."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@cache
def console(*, stderr: bool = False) -> Console:
    """Return the console; set `stderr` where stdout carries what a program reads."""
    # Without a terminal rich assumes 80 columns and would break paths and log lines.
    width = None if (sys.stderr if stderr else sys.stdout).isatty() else 200
    return Screen(stderr=stderr, quiet=not is_rank_zero(), width=width, highlight=False, soft_wrap=True)


def progress_bar(label: str, count: ProgressColumn, screen: Console, **options: Any) -> Progress:
    """Return a progress bar with a description; `count` is the column with the progress, `options` go to rich."""
    columns = (BarColumn(bar_width=12), TextColumn("{task.description}"), TimeRemainingColumn())
    return Progress(TextColumn(label), count, *columns, console=screen, **options)


@contextmanager
def showing_progress(what: str, screen: Console) -> Iterator[Callable[..., None]]:
    """Show the progress of a long task while the block runs: a bar on a terminal, elsewhere a line every 5 seconds.

    Yields:
        show(done, in_all, text, *, finished): `in_all` is 0 where the total is unknown; the finished text is kept.
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
