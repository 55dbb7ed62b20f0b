"""`diff`: the first step and quantity in which two runs differ, and what may explain it."""

from pathlib import Path

from rich.markup import escape

from qwlit.commands.options import own_options
from qwlit.core.console import console
from qwlit.core.errors import ConfigError, NotEqual


def main(arguments: list[str]) -> None:
    from qwlit.run.difference import compare_runs
    from qwlit.run.verify import find_run

    own, rest = own_options(arguments, {"a": None, "b": None, "run.root": None})
    if rest or not (own["a"] and own["b"]):
        raise ConfigError(f"{' '.join(rest) or 'diff'}: give two runs, diff a=RUN b=RUN")
    paths = [find_run(str(own[name]), own["run.root"] or "runs", option=name) for name in ("a", "b")]
    found = compare_runs(*paths)
    screen = console()
    screen.print(f"[bold]{escape(str(paths[0]))}[/] and [bold]{escape(str(paths[1]))}[/]")
    how = "to the bit" if found.to_the_bit else "in the logged numbers (without trace.jsonl in both, not to the bit)"
    if found.difference is None:
        screen.print(f"  equal {how}, over {found.compared_steps} steps")
    else:
        screen.print(f"  first difference  step {found.difference.step}, {found.difference.quantity}")
        for path, value in zip(paths, found.difference.values, strict=True):
            screen.print(f"    {escape(str(path))}: {value}", highlight=False)
        screen.print(f"  where             {found.meaning}")
        screen.print(f"  compared          {how}; equal up to step {found.last_equal_step or 0}")
    for entry in found.circumstances:
        screen.print(f"  not the same      {escape(entry)}", highlight=False)
    if found.difference:
        raise NotEqual(f"{_names(paths)} differ from step {found.difference.step} on")


def _names(paths: list[Path]) -> str:
    return " and ".join(str(path) for path in paths)
