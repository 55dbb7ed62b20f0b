"""`report`: the ledger of runs, on the terminal and as a page."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qwlit.commands.words import own_words
from qwlit.core.console import console
from qwlit.core.errors import ConfigError
from qwlit.core.lists import read_list

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from qwlit.report.compare import Ledger
    from qwlit.report.importance import Importance
    from qwlit.report.table import Column

OUTPUTS = ("text", "json")
JUDGED = 4
"""The first columns, which every screen has room for: name, status, metric and difference."""
MOST_LISTED = 6
"""Settings that a row names where too many differ for a column each; the page has all."""
GAP, FOLDED = 2, 20
"""Characters between columns, and those that a folded text takes at least."""
WORDS = {"runs": None, "baseline": None, "output": OUTPUTS, "page": None}

HELP = """\
python -m qwlit report runs=[RUN,...] [baseline=RUN] [output=text|json] [page=FILE]

The ledger of runs: what differed in their settings, what came of it, what happened on the way, the best first; and
report.html with curves, and from four runs on which settings mattered. Reads run folders, runs nothing.

  report runs=runs/demo                          one run: its curves, events and samples
  report runs=[runs/a,runs/b]                    what b did differently, and what came of it
  report 'runs=[runs/lora-*]' baseline=lora-2e-4 all of a name, against one of them
  report runs=runs/lora                          a sweep: its trials, which settings mattered and where
  report 'runs=[runs/*]' output=json             for machines, one document; the page is written as well

  runs       run folders, sweep folders and globs, as a list or a single one
  baseline   name or folder of the run that the others are measured against; by default the first one named, of a
             sweep its best trial
  output     text, or json
  page       where the page goes; by default report.html in the run's folder, in the sweep's, or in the folder that all
             runs are in

Runs that cannot be compared (other validation data, device, precision or code) are said to be so.
"""


def main(arguments: list[str]) -> int:
    if any(word in ("-h", "--help") for word in arguments):
        print(HELP, end="")
        return 0
    own, rest = own_words(arguments, WORDS)
    if rest:
        raise ConfigError(f"'{rest[0]}' is no word of report. Runs are named runs=[a,b]")
    if not own["runs"]:
        raise ConfigError("runs is not set; name run folders, sweeps or globs, e.g. runs=[runs/a,runs/b]")
    _report(own["runs"], own["baseline"] or None, own["page"] or None, as_json=own["output"] == "json")
    return 0


def _report(runs: str, baseline: str | None, page: str | None, *, as_json: bool) -> None:
    from qwlit.core.files import resolve_path
    from qwlit.report.compare import build_ledger
    from qwlit.report.importance import importance
    from qwlit.report.page import FILE, write_page
    from qwlit.report.remarks import remarks

    words = read_list(runs)
    if not words:
        raise ConfigError(f"runs={runs} is empty; name run folders, sweeps or globs, e.g. runs=[runs/a,runs/b]")
    try:
        ledger = build_ledger(words, baseline)
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be read: {error.strerror}") from None
    remarked, judged = remarks(ledger), importance(ledger)
    place = resolve_path(page) if page else ledger.home / FILE
    write_page(ledger, remarked, judged, place)
    if as_json:
        print(json.dumps(_as_json(ledger, remarked, judged, place), indent=1, ensure_ascii=False))
    else:
        _show(ledger, remarked, judged, place, console())


def _as_json(ledger: "Ledger", remarked: list[str], judged: "Importance | None", place: Path) -> dict[str, Any]:
    """Return the ledger as machines read it; null is what is not known."""
    from dataclasses import asdict

    from qwlit.report.table import EVENTS

    return {
        "metric": {"name": ledger.metric.name, "goal": "minimize" if ledger.metric.minimize else "maximize"},
        "best": ledger.best.name if ledger.best else None,
        "baseline": ledger.baseline.name,
        "differing": list(ledger.differing),
        "remarks": remarked,
        "runs": [
            {
                "name": run.name,
                "path": str(run.path) if run.path else None,
                "status": run.status,
                "reason": run.trial.reason if run.trial else None,
                "value": ledger.value(run),
                "delta": ledger.delta(run),
                **asdict(run.figures),
                "settings": {key: run.settings[key] for key in ledger.differing if key in run.settings},
                "events": {event: run.count(event) for event in EVENTS},
            }
            for run in ledger.runs
        ],
        "importance": None if judged is None else {"shares": judged.shares, "caveats": judged.caveats},
        "page": str(place),
    }


def _show(ledger: "Ledger", remarked: list[str], judged: "Importance | None", place: Path, screen: "Console") -> None:
    """Print the ledger as a person reads it."""
    from rich.markup import escape

    from qwlit.report.page import headline

    screen.print(f"[bold]{escape(headline(ledger))}[/]\n")
    _show_table(ledger, screen)
    if judged is not None:
        screen.print("\n[bold]which settings mattered[/]")
        for key, share in judged.shares.items():
            screen.print(f"  {escape(key):<30}{share:>6.2f}  [cyan]{'▇' * round(30 * share)}[/]")
        for text in judged.caveats:
            screen.print(f"  [dim]{escape(text)}[/]")
    if remarked:
        screen.print("\n[bold]before you compare[/]")
    for text in remarked:
        screen.print(f"  [yellow]{escape(text)}[/]")
    screen.print(f"\n[bold]page[/]  {escape(str(place))}")


def _show_table(ledger: "Ledger", screen: "Console") -> None:
    """Print the columns that the screen has room for, leaving out figures from the right."""
    from qwlit.report.table import columns

    parts = columns(ledger, most_listed=MOST_LISTED)
    left_out: list[str] = []
    while sum(_width(part) + GAP for part in parts) > screen.width + GAP:
        figures = [part for part in parts[JUDGED:] if part.kind == "number"]
        if not figures:
            break
        parts.remove(figures[-1])
        left_out.insert(0, figures[-1].title)
    screen.print(_table(ledger, parts), soft_wrap=False)
    if left_out:
        screen.print(f"[dim]no room here for {', '.join(left_out)}: they are in the page[/]")


def _width(part: "Column") -> int:
    """Return the characters that a column takes at least: texts are folded, what is short is not."""
    from rich.cells import cell_len

    widest = max(cell_len(line) for text in (*part.title_lines, *part.cells) for line in text.splitlines())
    return min(widest, FOLDED) if part.kind == "text" else widest


def _table(ledger: "Ledger", parts: "list[Column]") -> "Table":
    from rich.table import Table
    from rich.text import Text

    height = max(len(part.title_lines) for part in parts)
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="dim")
    for part in parts:
        justify: Literal["left", "right"] = "right" if part.kind == "number" else "left"
        title = "\n" * (height - len(part.title_lines)) + "\n".join(part.title_lines)
        table.add_column(Text(title), justify=justify, overflow="fold", no_wrap=part.kind != "text")
    for number, run in enumerate(ledger.runs):
        cells = [Text(part.cells[number], "bold cyan" if part.marked[number] else "") for part in parts]
        table.add_row(*cells, style=None if run.settled else "dim")
    return table
