"""Warnings before a comparison: the runs differ in more than their settings, or only by noise."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from qwlit.report.compare import RunComparison, canonical
from qwlit.report.evaluated import question_of
from qwlit.report.runs import RunRecord
from qwlit.training.checkpointing.folder import linked_checkpoint
from qwlit.training.tracking.run_folder import RunFolder

NAMED = 4
"""A list names this many runs and counts the rest."""


@dataclass(frozen=True)
class Condition:
    """Something other than a setting that decides whether results can be compared, such as the device."""

    title: str
    read: Callable[[RunRecord], str | None]
    warning: str
    """Printed if the runs differ in this condition."""
    shown: bool = True
    """Whether a reader understands the values; fingerprints are not shown."""


def _recorded(key: str) -> Callable[[RunRecord], str | None]:
    def read(run: RunRecord) -> str | None:
        value = run.manifest.get(key)
        return None if value is None else str(value)

    return read


def _torch(run: RunRecord) -> str | None:
    version = run.manifest.get("packages", {}).get("torch")
    return None if version is None else str(version)


def _device(run: RunRecord) -> str | None:
    device = run.manifest.get("device")
    count = run.manifest.get("devices", 1) * run.manifest.get("num_nodes", 1)
    return None if device is None else f"{count} x {device}"


def _code(run: RunRecord) -> str | None:
    version, git = run.manifest.get("qwlit"), run.manifest.get("git")
    if not isinstance(git, dict):
        return None if version is None else str(version)
    return f"{version} at {str(git.get('commit'))[:7]}{' with changes' if git.get('dirty') else ''}"


def data_fingerprints(run: RunRecord) -> tuple[str | None, str | None]:
    """Return the fingerprints of the training data and of the validation data.

    The manifest has one text for both (`DataSplit.fingerprint`): a+b*weights/fraction. Each of a, b, … is one store;
    the stores of `data.path` come first.
    """
    text = run.manifest.get("data")
    if not isinstance(text, str):
        return None, None
    text, _, fraction = text.partition("/")
    text, _, weights = text.partition("*")
    stores = text.split("+")
    path = run.settings.get("data.path")
    num_parts = len(path) if isinstance(path, list) else 1
    training, validation = stores[:num_parts], stores[num_parts:]
    if fraction:
        held_out = [fraction, str(run.settings.get("data.drop_duplicates"))]
        return "+".join([*training, weights, *held_out]), "+".join([*training, *held_out])
    return "+".join([*training, weights]), "+".join(validation) or None


CONDITIONS = (
    Condition(
        "validation data",
        lambda run: data_fingerprints(run)[1],
        "The validation sets differ, or their tokenization or loss mask: val/loss cannot be compared",
        shown=False,
    ),
    Condition(
        "evaluated rows",
        lambda run: question_of(run.evaluation),
        "The runs were evaluated on other rows, prompts or temperatures: what `evaluate` measured cannot be compared",
        shown=False,
    ),
    Condition(
        "training data", lambda run: data_fingerprints(run)[0], "The runs trained on different data", shown=False
    ),
    Condition("device", _device, "The runs used different devices: time, speed and memory cannot be compared"),
    Condition("precision", _recorded("precision"), "Precision differs, and so does the rounding of every step"),
    Condition("attention", _recorded("attention"), "Attention differs, and so does the rounding of every step"),
    Condition("determinism", _recorded("determinism"), "Determinism differs"),
    Condition("code", _code, "The runs used different versions of qwlit"),
    Condition("torch", _torch, "The runs used different versions of torch"),
)


def comparable(runs: Iterable[RunRecord]) -> bool:
    """Whether all known validation sets of the runs are the same, so that their losses can be compared."""
    return len({data_fingerprints(run)[1] for run in runs} - {None}) < 2


def comparison_warnings(comparison: RunComparison) -> list[str]:
    """Return the warnings that a reader needs before comparing the runs."""
    runs = [run for run in comparison.runs if run.exists]
    earlier = [f"{run.name} ({checkpoint})" for run in runs if (checkpoint := _evaluated_before(run))]
    found = [f"These runs have trained on since `evaluate` measured them: {_list(earlier)}"] if earlier else []
    if len(runs) < 2:
        return found
    found += [text for condition in CONDITIONS if (text := _difference(condition, runs))]
    unknown = [run.name for run in runs if not run.manifest]
    if unknown:
        found.append(f"These runs have no manifest.json, so their device and versions are unknown: {_list(unknown)}")
    return found + _noise(comparison)


def _evaluated_before(run: RunRecord) -> str | None:
    """Return the name of the evaluated checkpoint if it is neither the run's best nor its last one any more."""
    checkpoint = run.evaluation.get("checkpoint")
    folder = RunFolder(run.path)
    linked = {path.name for name in ("best", "last") if (path := linked_checkpoint(folder, name))}
    return checkpoint if isinstance(checkpoint, str) and linked and checkpoint not in linked else None


def _difference(condition: Condition, runs: Iterable[RunRecord]) -> str | None:
    groups: dict[str, list[str]] = {}
    for run in runs:
        value = condition.read(run)
        if value is not None:
            groups.setdefault(value, []).append(run.name)
    if len(groups) < 2:
        return None
    parts = [(f"{value}: " if condition.shown else "") + _list(names) for value, names in groups.items()]
    return f"{condition.warning}. {' | '.join(parts)}"


def _list(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _noise(comparison: RunComparison) -> list[str]:
    """Report the spread of runs with equal settings, including the seed. Smaller differences mean nothing."""
    groups: dict[tuple[str, ...], list[RunRecord]] = {}
    for run in comparison.runs:
        if run.finished and run.settings and comparison.value(run) is not None:
            groups.setdefault(settings_of(run, comparison), []).append(run)
    found = []
    for group in groups.values():
        if len(group) > 1:
            values: list[Any] = [comparison.value(run) for run in group]
            names, spread = _list([run.name for run in group]), max(values) - min(values)
            found.append(f"With the same settings and seed, {names} differ by {spread:.2g} in {comparison.metric.name}")
    return found


def settings_of(run: RunRecord, comparison: RunComparison, ignored: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return what two runs share if they have the same data and, but for the ignored ones, the same settings."""
    settings = (canonical(run.settings.get(key)) for key in comparison.differing if key not in ignored)
    return tuple(settings) + tuple(map(str, data_fingerprints(run)))
