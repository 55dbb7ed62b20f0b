"""What the page shows of a single run: how it was computed, its settings, its events and its answers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from qwlit.core.files import read_json_lines
from qwlit.core.metric import number_or_none
from qwlit.report.comparability import CONDITIONS
from qwlit.report.runs import RunRecord
from qwlit.report.table import show_setting

MOST_LINES = 100
GUARANTEES = {
    "fast": "the same command may give other last digits",
    "reproducible": "the same machine, packages and devices give the same bits",
    "strict": "the same machine, packages and devices give the same bits, in float32 with eager attention",
}
"""What each value of determinism promises, see docs/determinism.md."""
OWN_COLUMNS = ("step", "event", "time")
GROUPS = ("experiment", "model", "data", "recipe", "hardware", "optim", "scheduler", "dropout")


@dataclass(frozen=True)
class TextTable:
    """A table of texts, and a note about it."""

    titles: list[str]
    lines: list[list[str]]
    note: str


@dataclass(frozen=True)
class RunDetails:
    """What the page shows only for a single run."""

    in_words: str
    conditions: dict[str, str]
    """What a reader needs to repeat the run to the last digit: device, precision, versions, seed."""
    settings: dict[str, str]
    events: TextTable | None
    samples: TextTable | None


def describe(run: RunRecord) -> RunDetails:
    """Collect the details of a run; what its folder lacks is empty or None."""
    settings = {key: show_setting(value) for key, value in run.settings.items()}
    return RunDetails(_in_words(run), _conditions(run), settings, _events(run), _samples(run))


def _in_words(run: RunRecord) -> str:
    """State determinism, attention, precision and devices in one sentence."""
    determinism = run.manifest.get("determinism")
    conditions = {condition.title: condition.read(run) for condition in CONDITIONS}
    parts = [f"attention {conditions['attention']}", conditions["precision"], conditions["device"]]
    return (
        f"{determinism}: {GUARANTEES[determinism]}; {', '.join(map(str, parts))}." if determinism in GUARANTEES else ""
    )


def _conditions(run: RunRecord) -> dict[str, str]:
    choices = run.manifest.get("choices", {})
    conditions = {condition.title: condition.read(run) for condition in CONDITIONS if condition.shown}
    conditions["choices"] = " ".join(f"{group}={choices[group]}" for group in GROUPS if choices.get(group))
    conditions["seed"] = str(run.manifest.get("seed", ""))
    return {title: text for title, text in conditions.items() if text}


def _events(run: RunRecord) -> TextTable | None:
    """List all events but checkpoints, which are only counted."""
    if not run.events:
        return None
    listed = [event for event in run.events if event.get("event") != "checkpoint"]
    num_checkpoints = run.count("checkpoint")
    more = f", and {len(listed) - MOST_LINES} more events" if len(listed) > MOST_LINES else ""
    note = f"{num_checkpoints} checkpoint{'s' * (num_checkpoints != 1)}{more}"
    return TextTable(["step", "when", "event", ""], [_event_line(event) for event in listed[:MOST_LINES]], note)


def _event_line(event: Mapping[str, Any]) -> list[str]:
    """Return step, time, kind and the remaining entries of an event."""
    decision = event.get("decision")
    if isinstance(decision, Mapping):
        # Of a rollback: the decisions of before are events of their own.
        event = {**{key: event[key] for key in OWN_COLUMNS if key in event}, **decision}
    rest = [f"{name}: {value}" for name, value in event.items() if name not in OWN_COLUMNS]
    return [str(event["step"]), _when(event.get("time")), event["event"], "; ".join(rest)]


def _when(seconds: Any) -> str:
    """Return a time stamp as a date; empty where it is none."""
    try:
        return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")
    except (TypeError, ValueError, OverflowError, OSError):
        return ""


def _samples(run: RunRecord) -> TextTable | None:
    samples = read_json_lines(run.path / "samples.jsonl")
    if not samples:
        return None
    # The trained model's answers first, then the newest of those in training, by prompt: so one sees them change.
    during = sorted((sample for sample in samples if "step" in sample), key=_training_step)[-MOST_LINES // 2 :]
    during.sort(key=lambda sample: str(sample.get("prompt")))
    after = [sample for sample in samples if "step" not in sample]
    shown = [*after[: MOST_LINES - len(during)], *during]
    texts = ("prompt", "answer", "expected")
    lines = [[_mark(sample), *(str(sample.get(text, "")) for text in texts)] for sample in shown]
    number = f"{len(shown)} of {len(samples)}" if len(samples) > len(shown) else f"{len(samples)}"
    return TextTable(["", "prompt", "answer", "expected"], lines, f"{number} answers")


def _training_step(sample: Mapping[str, Any]) -> float:
    """Return the step of an answer in training; infinity for an answer after it."""
    step = number_or_none(sample.get("step"))
    return math.inf if step is None else step


def _mark(sample: Mapping[str, Any]) -> str:
    """Return whether an answer is the expected one; for an answer in training its step."""
    if "step" in sample:
        return f"step {sample['step']}"
    return "✓" if sample.get("exact") else "✗"
