"""The console: rank 0 prints what a person reads to stdout; the other ranks print nothing."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import IO, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.table import Column, Table

from qwlit.core.errors import printable
from qwlit.core.ranks import is_rank_zero
from qwlit.core.streams import discard, say

PLAIN_LINE_SECONDS = 5.0
NARROW = 62
"""Below this width a bar's columns would leave no room for a loss beside a count of two numbers of seven digits."""
SPEED_SECONDS = 24 * 3600.0
"""A bar estimates the time left from the progress of this time, at most of the last 1,000 steps."""


class Screen(Console):
    """A console for text of the user: it prints no control characters, and it never ends a training.

    It becomes quiet when it cannot print any more: the reader closed the pipe (`| head`), the disk is full, or the
    terminal is closed.
    """

    @property
    def file(self) -> IO[str]:
        """The stream below `PrintableStream`; while a bar is shown, rich has put a stream of its own before that."""
        file = super().file
        return getattr(file, "rich_proxied_file", file)

    @file.setter
    def file(self, stream: IO[str]) -> None:
        self._file = stream

    def on_broken_pipe(self) -> None:
        self.quiet = True
        discard(sys.stderr if self.stderr else sys.stdout)

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError as error:
            self.on_broken_pipe()
            say(f"qwlit: standard output cannot be written ({error.strerror}), so nothing more is shown")

    def _render_buffer(self, buffer: Iterable[Segment]) -> str:
        # Segments with `control` are the console's own, such as the cursor movements of a bar.
        return super()._render_buffer(s if s.control else s._replace(text=printable(s.text)) for s in buffer)


@cache
def console(*, stderr: bool = False) -> Screen:
    """Return the console; set `stderr` where stdout carries what a program reads."""
    # Without a terminal rich assumes 80 columns and would break paths and log lines.
    width = None if (sys.stderr if stderr else sys.stdout).isatty() else 200
    return Screen(stderr=stderr, quiet=not is_rank_zero(), width=width, highlight=False, soft_wrap=True, emoji=False)


def can_redraw(screen: Console) -> bool:
    """Whether it is a terminal that can redraw a line, as a progress bar does."""
    return screen.is_terminal and not screen.is_dumb_terminal


class _ProgressBar(Progress):
    """Its columns are those of `progress_bar`; while the terminal is narrow, some are left out."""

    def __init__(self, *columns: ProgressColumn, console: Console, **options: Any) -> None:
        self._screen = console
        super().__init__(*columns, console=console, **options)

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        every = self.columns
        if self._screen.width < NARROW:
            _label, count, _bar, _elapsed, *time_left_and_description = every
            self.columns = (count, *time_left_and_description)
        table = super().make_tasks_table(tasks)
        self.columns = every
        return table


def progress_bar(label: str, count: ProgressColumn, screen: Console, **options: Any) -> Progress:
    """Return a progress bar with a description; `count` is the column with the progress, `options` go to rich."""
    times = (TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn())
    # The description is the column that becomes shorter where the screen is narrow.
    description = TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True))
    columns = (TextColumn(label), count, BarColumn(bar_width=8), *times, description)
    # By default rich forgets steps after 30 s, so it would know no speed where a step takes longer.
    return _ProgressBar(*columns, console=screen, expand=True, speed_estimate_period=SPEED_SECONDS, **options)


@contextmanager
def showing_progress(what: str, screen: Console) -> Iterator[Callable[..., None]]:
    """Show the progress of a long task while the block runs: a bar on a terminal, elsewhere a line every 5 seconds.

    Yields:
        show(done, in_all, text, *, finished): `in_all` is 0 where the total is unknown; the finished text is kept.
    """
    bar = progress_bar(what, TaskProgressColumn(), screen, transient=True, disable=not can_redraw(screen))
    last_line = time.monotonic()

    def show(done: int, in_all: int, text: str, *, finished: bool = False) -> None:
        nonlocal last_line
        if finished:
            screen.print(f"{what} done: {text}")
        elif can_redraw(screen):
            task = bar.task_ids[0] if bar.task_ids else bar.add_task("")
            bar.update(task, completed=done, total=in_all or None, description=text)
        elif time.monotonic() - last_line > PLAIN_LINE_SECONDS:
            last_line = time.monotonic()
            screen.print(f"{what}: {done / in_all:.0%}, {text}" if in_all else f"{what}: {text}")

    with bar:
        yield show
