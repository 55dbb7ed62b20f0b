"""The screen: what a person reads goes to stdout, on rank 0 only."""

import sys
from functools import cache

from rich.console import Console

from qwlit.core.ranks import is_rank_zero


@cache
def console() -> Console:
    # Without a terminal rich assumes 80 columns and would fold paths and log lines.
    width = None if sys.stdout.isatty() else 200
    return Console(quiet=not is_rank_zero(), width=width, highlight=False, soft_wrap=True)
