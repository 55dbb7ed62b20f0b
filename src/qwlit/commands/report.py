"""`report`: compare runs, on the terminal and as an HTML page."""

import contextlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from qwlit.commands.options import own_options
from qwlit.core.console import console
from qwlit.core.errors import ConfigError
from qwlit.core.files import resolve_path
from qwlit.core.lists import read_list
from qwlit.core.streams import say, write_json
from qwlit.report.comparability import comparison_warnings
from qwlit.report.compare import RunComparison, build_comparison
from qwlit.report.diagnosis import Diagnosis, diagnose
from qwlit.report.evaluated import scores
from qwlit.report.importance import Importance, importance
from qwlit.report.page import FILE, headline, write_page
from qwlit.report.repeats import find_repeats, judge, table_of
from qwlit.report.single import TextTable
from qwlit.report.table import EVENTS, Column, columns

OUTPUTS = ("text", "json")
ALWAYS_SHOWN = 4
"""Number of leading columns that are always shown: name, status, metric and difference."""
MOST_LISTED = 6
"""Settings listed per run if too many differ for one column each; the page lists all."""
GAP, FOLDED = 2, 20
"""Characters between two columns, and the smallest width of a column of folded text."""
REFRESH_SECONDS = 10
OPTIONS = {"runs": None, "baseline": None, "output": OUTPUTS, "page": None, "follow": ("false", "true")}


def main(arguments: list[str]) -> None:
    own, rest = own_options(arguments, OPTIONS)
    if rest:
        raise ConfigError(f"'{rest[0]}' is not an option of report; name runs as runs=[a,b]")
    if not own["runs"]:
        raise ConfigError("runs is not set; name run folders, sweeps or globs, e.g. runs=[runs/a,runs/b]")
    names = read_list(own["runs"])
    if not names:
        raise ConfigError(f"runs={own['runs']} is empty; name run folders, sweeps or globs, e.g. runs=[runs/a,runs/b]")
    if own["follow"] == "true":
        _follow(names, own)
    comparison, warnings, shares, file = _compare(names, own)
    write_page(comparison, warnings, shares, file)
    if own["output"] == "json":
        write_json(json.dumps(_as_json(comparison, warnings, shares, file), indent=1, ensure_ascii=False))
    else:
        _show(comparison, warnings, shares, file, console())


def _compare(names: list[str], own: dict[str, str | None]) -> tuple[RunComparison, list[str], Importance | None, Path]:
    """Return the comparison, its warnings, the importance of settings, and the place of the page."""
    try:
        comparison = build_comparison(names, own["baseline"] or None)
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be read: {error.strerror}") from None
    file = resolve_path(own["page"]) if own["page"] else comparison.home / FILE
    return comparison, comparison_warnings(comparison), importance(comparison), file


def _follow(names: list[str], own: dict[str, str | None]) -> None:
    """Write the page again and again until no run is running, or until Ctrl-C."""
    say(f"qwlit: the page is written every {REFRESH_SECONDS} s while a run trains; Ctrl-C ends that")
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            comparison, warnings, shares, file = _compare(names, own)
            if all(run.status != "running" for run in comparison.runs):
                return
            write_page(comparison, warnings, shares, file, refresh=REFRESH_SECONDS)
            time.sleep(REFRESH_SECONDS)


def _as_json(comparison: RunComparison, warnings: list[str], shares: Importance | None, file: Path) -> dict[str, Any]:
    """Return the comparison for scripts; unknown values are null."""
    return {
        "metric": {"name": comparison.metric.name, "goal": comparison.metric.goal},
        "best": comparison.best.name if comparison.best else None,
        "baseline": comparison.baseline.name,
        "differing": list(comparison.differing),
        "remarks": warnings,
        "runs": [
            {
                "name": run.name,
                "path": str(run.path) if run.exists else None,
                "status": run.status,
                "reason": run.trial.reason if run.trial else None,
                "value": comparison.value(run),
                "delta": comparison.delta(run),
                **asdict(run.results),
                "evaluation": {title: asdict(score) for title, score in scores(run.evaluation).items()},
                "settings": {key: run.settings[key] for key in comparison.differing if key in run.settings},
                "events": {event: run.count(event) for event in EVENTS},
                "diagnosis": asdict(diagnose(run)) if run.exists else None,
            }
            for run in comparison.runs
        ],
        "repeats": [
            {
                "settings": group.settings,
                "runs": [run.name for run in group.runs],
                "metrics": {metric: asdict(found) for metric, found in group.estimates.items()},
            }
            for group in find_repeats(comparison)
        ],
        "verdicts": [
            asdict(verdict) | {"differs": verdict.differs} for verdict in judge(comparison, find_repeats(comparison))
        ],
        "importance": None if shares is None else {"shares": shares.shares, "caveats": shares.caveats},
        "page": str(file),
    }


def _show(
    comparison: RunComparison, warnings: list[str], shares: Importance | None, file: Path, screen: Console
) -> None:
    """Print the comparison for a person."""
    screen.print(f"[bold]{escape(headline(comparison))}[/]\n")
    _show_table(comparison, screen)
    _show_diagnoses(comparison, screen)
    show_repeats(comparison, screen)
    if shares is not None:
        screen.print("\n[bold]which settings mattered[/]")
        for key, share in shares.shares.items():
            screen.print(f"  {escape(key):<30}{share:>6.2f}  [cyan]{'▇' * round(30 * share)}[/]")
        for text in shares.caveats:
            screen.print(f"  [dim]{escape(text)}[/]")
    if warnings:
        screen.print("\n[bold]before you compare[/]")
    for text in warnings:
        screen.print(f"  [yellow]{escape(text)}[/]")
    screen.print(f"\n[bold]page[/]  {escape(str(file))}")


def show_repeats(comparison: RunComparison, screen: Console) -> None:
    """Print what runs with other seeds say; nothing where there are none."""
    groups = find_repeats(comparison)
    if not groups:
        return
    screen.print("\n[bold]seeds[/]")
    screen.print(_plain_table(table_of(groups)))
    for verdict in judge(comparison, groups):
        screen.print(f"  {escape(verdict.text())}", highlight=False)


def _plain_table(content: TextTable) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="dim")
    for title in content.titles:
        table.add_column(Text(title), justify="left" if title in ("settings", "metric") else "right", overflow="fold")
    for line in content.lines:
        table.add_row(*map(Text, line))
    return table


def _show_table(comparison: RunComparison, screen: Console) -> None:
    """Print the table; on a narrow screen leave out columns of numbers, from the right."""
    parts = columns(comparison, most_listed=MOST_LISTED)
    left_out: list[str] = []
    while sum(_width(part) + GAP for part in parts) > screen.width + GAP:
        removable = [part for part in parts[ALWAYS_SHOWN:] if part.kind == "number"]
        if not removable:
            break
        parts.remove(removable[-1])
        left_out.insert(0, removable[-1].title)
    screen.print(_table(comparison, parts), soft_wrap=False)
    if left_out:
        screen.print(f"[dim]the screen is too narrow for {', '.join(left_out)}: see the page[/]")


def _show_diagnoses(comparison: RunComparison, screen: Console) -> None:
    """Print the symptoms; of several runs, only those that have some, and not what was looked at."""
    for run in comparison.runs:
        diagnosis = diagnose(run)
        if not run.exists or (len(comparison.runs) > 1 and not diagnosis.symptoms):
            continue
        screen.print(f"\n[bold]diagnosis[/]{f' of {escape(run.name)}' * (len(comparison.runs) > 1)}")
        _show_diagnosis(diagnosis, screen)
        if any(symptom.remedies for symptom in diagnosis.symptoms):
            again = f"qwlit train config={run.path / 'config.yaml'} run.name={run.path.name}-2"
            screen.print(f"  with      {escape(again)}", soft_wrap=True)


def _show_diagnosis(diagnosis: Diagnosis, screen: Console) -> None:
    for symptom in diagnosis.symptoms:
        screen.print(f"  [yellow]{escape(symptom.name)}[/]")
        lines = [
            *(f"  because   {text}" for text in symptom.evidence),
            *(f"  try       {text}" for text in symptom.remedies),
        ]
        screen.print(escape("\n".join([*lines, f"  also      {symptom.advice}"])), highlight=False, soft_wrap=True)
    if not diagnosis.symptoms:
        screen.print(escape(f"  no symptom found in {diagnosis.looked_at}"), highlight=False)


def _width(part: Column) -> int:
    """Return the smallest width of a column in characters: only columns of text are folded."""
    widest = max(cell_len(line) for text in (*part.title_lines, *part.cells) for line in text.splitlines())
    return min(widest, FOLDED) if part.kind == "text" else widest


def _table(comparison: RunComparison, parts: list[Column]) -> Table:
    height = max(len(part.title_lines) for part in parts)
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="dim")
    for part in parts:
        justify: Literal["left", "right"] = "right" if part.kind == "number" else "left"
        title = "\n" * (height - len(part.title_lines)) + "\n".join(part.title_lines)
        table.add_column(Text(title), justify=justify, overflow="fold", no_wrap=part.kind != "text")
    for index, run in enumerate(comparison.runs):
        cells = [Text(part.cells[index], "bold cyan" if index in part.marked else "") for part in parts]
        table.add_row(*cells, style=None if run.finished else "dim")
    return table
