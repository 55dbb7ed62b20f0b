"""Which runs are meant: run folders, globs, and sweep folders, which stand for their trials."""

import glob
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwlit.core.errors import ConfigError, nearest
from qwlit.core.files import resolve_path
from qwlit.training.tracking.run_folder import RunFolder

SWEEP_FILE = "sweep.json"


@dataclass(frozen=True)
class Metric:
    """What runs are ordered by: a column of metrics.jsonl, or an entry of summary.json."""

    name: str = "val/loss"
    minimize: bool = True

    @property
    def best(self) -> Callable[[Iterable[float]], float]:
        return min if self.minimize else max


@dataclass(frozen=True)
class Sweep:
    """A folder of trials."""

    path: Path
    name: str
    metric: Metric


@dataclass(frozen=True)
class Trial:
    """What the sweep knows of one of its runs."""

    sweep: Sweep
    number: int
    state: str
    """done, pruned, failed, diverged or running"""
    value: float | None
    params: Mapping[str, Any]
    reason: str | None


@dataclass(frozen=True)
class Found:
    """A run, or a trial of which there is only what the sweep says: it ended before it had a folder."""

    place: Path
    exists: bool = True
    trial: Trial | None = None


def find_runs(words: Iterable[str]) -> list[Found]:
    """Return the runs in the order in which they are named, each once.

    Raises:
        ConfigError: a word names nothing, or something that is no run.
    """
    found: dict[Path, Found] = {}
    for word in words:
        for run in _named(word):
            found.setdefault(run.place.resolve(), run)
    return list(found.values())


def _named(word: str) -> list[Found]:
    path = resolve_path(word)
    if path.is_dir():
        return _inside(path) or _refuse(path)
    if glob.has_magic(str(path)):
        # Path.glob would also take hidden folders, such as one that is just being deleted.
        matches = sorted(glob.glob(str(path)))  # noqa: PTH207
        runs = [run for match in matches for run in _inside(Path(match))]
        if runs:
            return runs
        raise ConfigError(f"runs={word} matches no run.{_similar(path)}")
    if path.exists():
        raise ConfigError(f"runs={word} is a file; name the run's folder")
    hint = " Several runs are written runs=[a,b]." if "," in word else _similar(path)
    raise ConfigError(f"runs={word}: there is no such folder.{hint}")


def _inside(path: Path) -> list[Found]:
    if _is_sweep(path):
        return _trials(path)
    return [Found(path)] if _is_run(path) else []


def _is_sweep(path: Path) -> bool:
    return (path / SWEEP_FILE).exists()


def _is_run(path: Path) -> bool:
    return path.is_dir() and (RunFolder(path).holds_run or (path / "metrics.jsonl").exists())


def _refuse(path: Path) -> list[Found]:
    holds_runs = any(_is_run(child) or _is_sweep(child) for child in path.iterdir())
    remedy = f"it holds runs: name them with {path}/*" if holds_runs else "it has no config.yaml and no summary.json"
    raise ConfigError(f"runs={path} is no run: {remedy}")


def _similar(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    return nearest(path.name, (c.name for c in path.parent.iterdir() if _is_run(c) or _is_sweep(c)))


def _trials(path: Path) -> list[Found]:
    file = path / SWEEP_FILE
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        metric = Metric(str(document["metric"]["name"]), document["metric"].get("goal") != "maximize")
        sweep = Sweep(path, str(document.get("name") or path.name), metric)
        found = [_trial(sweep, entry) for entry in document["trials"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{file} cannot be read as a sweep's; name its runs one by one, or {path}/*") from None
    if not found:
        raise ConfigError(f"runs={path}: the sweep has no trials yet")
    return found


def _trial(sweep: Sweep, entry: Mapping[str, Any]) -> Found:
    number = int(entry["number"])
    folder = sweep.path / str(entry.get("run") or f"trial-{number:04d}")
    trial = Trial(
        sweep=sweep,
        number=number,
        state=str(entry.get("state") or "unknown"),
        value=number_or_none(entry.get("value")),
        params=dict(entry.get("params") or {}),
        reason=str(entry["reason"]) if entry.get("reason") else None,
    )
    return Found(folder, _is_run(folder), trial)


def number_or_none(value: Any) -> float | None:
    """Return a finite number; None for anything else: JSON writes NaN as null, and a broken file holds whatever."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
