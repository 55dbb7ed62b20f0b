"""What the page says of a single run: how it was computed, what happened, what it answered."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from qwlit.core.files import read_json_lines
from qwlit.report.elements import Html, element, join, table
from qwlit.report.remarks import CONDITIONS
from qwlit.report.runs import Run
from qwlit.report.table import show_setting

MOST_ROWS = 100
ANSWERED = ("prompt", "answer", "expected")
OUTLINE = ("step", "event", "time")
GROUPS = ("experiment", "model", "data", "recipe", "hardware", "optim", "scheduler", "dropout")


def describe(run: Run) -> list[Html]:
    return [part for part in (_conditions(run), _settings(run), _events(run), _samples(run)) if part]


def _conditions(run: Run) -> Html | None:
    """State what decides the last digits: nobody can repeat a run without it."""
    facts = {c.title: value for c in CONDITIONS if c.shown and (value := c.read(run))}
    choices = run.manifest.get("choices")
    if isinstance(choices, Mapping):
        chosen = {group: choices[group] for group in GROUPS if choices.get(group)}
        facts["choices"] = " ".join(f"{group}={choice}" for group, choice in chosen.items())
    facts |= {"seed": str(seed)} if (seed := run.manifest.get("seed")) is not None else {}
    return _pairs("How it was computed", facts) if facts else None


def _settings(run: Run) -> Html | None:
    settings = {key: show_setting(value) for key, value in run.settings.items()}
    return _folded("All settings", _pairs(None, settings)) if settings else None


def _pairs(title: str | None, facts: Mapping[str, str]) -> Html:
    entries = [join(element("dt", name), element("dd", text)) for name, text in facts.items() if text]
    return join(element("h2", title) if title else None, element("dl", *entries))


def _folded(title: str, content: Html) -> Html:
    return element("details", element("summary", title), content)


def _events(run: Run) -> Html | None:
    told = [row for row in run.events if row.get("event") != "checkpoint"]
    kept = run.count("checkpoint")
    if not run.events:
        return None
    rows = [
        element("tr", element("td", str(row.get("step", ""))), *(element("td", t, class_="text") for t in _tell(row)))
        for row in told[:MOST_ROWS]
    ]
    titles = [element("th", "step"), *(element("th", title, class_="text") for title in ("when", "event", ""))]
    more = f", and {len(told) - MOST_ROWS} events more" if len(told) > MOST_ROWS else ""
    return join(
        element("h2", "What happened"),
        table(titles, rows) if rows else None,
        element("p", f"{kept} checkpoint{'s' * (kept != 1)}{more}", class_="notes"),
    )


def _tell(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return when, what and the rest of an event."""
    when, rest = row.get("time"), [f"{name}: {value}" for name, value in row.items() if name not in OUTLINE]
    try:
        moment = datetime.fromtimestamp(when).strftime("%Y-%m-%d %H:%M:%S") if when else ""
    except (TypeError, ValueError, OverflowError, OSError):
        moment = ""
    return moment, str(row.get("event", "")), "; ".join(rest)


def _samples(run: Run) -> Html | None:
    samples = read_json_lines(run.path / "samples.jsonl") if run.path else []
    if not samples:
        return None
    keys: list[str] = [key for key in ANSWERED if key in samples[0]] or list(samples[0])
    rows = []
    for sample in samples[:MOST_ROWS]:
        right = sample.get("exact")
        mark = {True: "✓", False: "✗"}.get(right, "") if isinstance(right, bool) else ""
        texts = (element("td", str(sample.get(key, "")), class_="sample") for key in keys)
        rows.append(element("tr", element("td", mark), *texts))
    titles = [element("th", ""), *(element("th", key, class_="text") for key in keys)]
    more = f"the first {MOST_ROWS} of {len(samples)}" if len(samples) > MOST_ROWS else f"{len(samples)}"
    return join(element("h2", "Samples"), _folded(f"{more} answers", table(titles, rows)))
