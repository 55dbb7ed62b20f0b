"""The tables as Markdown, and their place in docs/performance.md."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.goals import goals
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.tables import COMPARED, Cells

RESULTS = Path(__file__).parents[1] / "results" / "gpu"
PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
HEADING = "### Measured on a GPU"
"""Everything in docs/performance.md from here on is written by `python -m benchmarks.gpu render`."""
UNMEASURED = "Unmeasured: `benchmarks/results/gpu` has no result files yet."
SHARES = {"of the peak", "MFU", "planned is off by", "of fast"}
"""Columns that are shown in per cent."""


def with_section(page: str, section: str) -> str:
    """Return the page with everything from `HEADING` on replaced."""
    return page[: page.index(HEADING)] + section


def render(folder: Path) -> str:
    """Return the section: the goals, and what each part has written; a part without a file is unmeasured."""
    found = read(folder)
    lines = [HEADING, ""]
    if not found:
        return "\n".join([*lines, UNMEASURED]) + "\n"
    devices = dict.fromkeys(str(part["machine"].get("gpu", "no GPU")) for part in found.values())
    lines += [f"| goal, on one H100 | | measured, on {', '.join(devices)} |", "|---|---|---|"]
    lines += [f"| {goal} | {wanted} | {measured or 'unmeasured'} |" for goal, wanted, measured in goals(found)]
    for name, part in PARTS.items():
        lines += ["", show(name, found[name]) if name in found else f"#### {part.title}\n\nUnmeasured."]
    return "\n".join(lines) + "\n"


def read(folder: Path) -> dict[str, Any]:
    """Return what the parts have written: part → its file."""
    return {name: json.loads(file.read_text()) for name in PARTS if (file := folder / f"{name}.json").exists()}


def show(name: str, result: dict[str, Any]) -> str:
    """Return one part's tables."""
    return "\n".join([f"#### {PARTS[name].title}", "", *_part(PARTS[name].module, result)])


def _part(module: Any, result: dict[str, Any]) -> list[str]:
    machine = ", ".join(f"{name} {value}" for name, value in result["machine"].items() if value is not None)
    settings = ", ".join(f"{name} {value}" for name, value in result["settings"].items())
    # A toy's figures say nothing, wherever they are shown.
    toy = ["**A toy: these figures say nothing.**", ""] if result["size"] == "toy" else []
    ended = [] if result["status"] == "done" else [f"**{result['status']}**; the rows before are complete.", ""]
    lines = [*toy, *ended, (module.__doc__ or "").strip(), ""]
    lines += [f"`{result['command']}`, {result['seconds']:.0f} s", ""]
    lines += [f"{machine}; {settings}", ""] if machine else []
    for table in dict.fromkeys(row["table"] for row in result["rows"]):
        rows = [
            {key: value for key, value in row.items() if key != "table"}
            for row in result["rows"]
            if row["table"] == table
        ]
        lines += [f"**{table}**", "", *_table(rows), ""]
    return lines[:-1]


def _table(rows: list[Cells]) -> list[str]:
    # What was compared comes last, also where the first row has nothing else.
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if name != COMPARED]
    columns = [name for name in columns if any(row.get(name) is not None for row in rows)] + [COMPARED]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return lines + [f"| {' | '.join(_cell(name, row.get(name)) for name in columns)} |" for row in rows]


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if column in SHARES:
        return f"{value:.1%}"
    shown: Callable[[float], str] = "{:,.0f}".format if abs(value) >= 100 else "{:.3g}".format
    return shown(value)
