"""Find the runs that the user names: run folders, globs, and sweep folders with their trials."""

import glob
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from qwlit.core.errors import ConfigError, nearest
from qwlit.core.files import load_json, read_small_text, resolve_path
from qwlit.core.metric import Metric, number_or_none
from qwlit.training.tracking.run_folder import RunFolder

SWEEP_FILE = "sweep.json"


@dataclass(frozen=True)
class SweepFolder:
    """A folder of trials."""

    path: Path
    name: str
    metric: Metric


@dataclass(frozen=True)
class Trial:
    """What sweep.json records about one trial."""

    sweep: SweepFolder
    number: int
    state: str
    """done, pruned, failed, diverged or running"""
    value: float | None
    params: Mapping[str, Any]
    reason: str | None


@dataclass(frozen=True)
class FoundRun:
    """A run, or a trial that ended before it had a run folder (`exists` is False)."""

    path: Path
    exists: bool = True
    trial: Trial | None = None


def find_runs(names: Iterable[str]) -> list[FoundRun]:
    """Return the runs in the order in which they are named, each once.

    Raises:
        ConfigError: a name matches nothing, or something that is not a run.
    """
    found: dict[Path, FoundRun] = {}
    for name in names:
        for run in _find(name):
            found.setdefault(run.path.resolve(), run)
    return list(found.values())


def _find(name: str) -> list[FoundRun]:
    """Read `name` as a path, then, as the other subcommands do, as a name in `runs/`."""
    path, in_root = resolve_path(name), resolve_path("runs") / name
    if path.is_dir():
        return _inside(path) or _inside(in_root) or _refuse(path)
    if not path.exists() and (found := _inside(in_root)):
        return found
    if glob.has_magic(str(path)):
        # Not Path.glob: it also matches hidden folders, such as one that is being deleted.
        for pattern in (path, in_root):
            matches = sorted(glob.glob(str(pattern)))  # noqa: PTH207
            if runs := [run for match in matches for run in _inside(Path(match))]:
                return runs
        raise ConfigError(f"runs={name} matches no run.{_similar(path)}")
    if path.exists():
        raise ConfigError(f"runs={name} is a file; name the run's folder")
    hint = " Several runs are written runs=[a,b]." if "," in name else _similar(path) or _similar(in_root)
    raise ConfigError(f"runs={name}: there is no such folder.{hint}")


def _inside(path: Path) -> list[FoundRun]:
    if _is_sweep(path):
        return _trials(path)
    return [FoundRun(path)] if _is_run(path) else []


def _is_sweep(path: Path) -> bool:
    return (path / SWEEP_FILE).exists()


def _is_run(path: Path) -> bool:
    return path.is_dir() and (RunFolder(path).holds_run or (path / "metrics.jsonl").exists())


def _refuse(path: Path) -> NoReturn:
    holds_runs = any(_is_run(child) or _is_sweep(child) for child in path.iterdir())
    remedy = f"it contains runs: name them with {path}/*" if holds_runs else "it has no config.yaml and no summary.json"
    raise ConfigError(f"runs={path} is not a run: {remedy}")


def _similar(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    return nearest(path.name, (c.name for c in path.parent.iterdir() if _is_run(c) or _is_sweep(c)))


def _trials(path: Path) -> list[FoundRun]:
    file = path / SWEEP_FILE
    try:
        document = load_json(read_small_text(file))
        metric = Metric(**document["metric"])
        sweep = SweepFolder(path, str(document.get("name", path.name)), metric)
        found = [_trial(sweep, entry) for entry in document["trials"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{file} is not a readable sweep.json; name its runs one by one, or {path}/*") from None
    if not found:
        raise ConfigError(f"runs={path}: the sweep has no trials yet")
    return found


def _trial(sweep: SweepFolder, entry: Mapping[str, Any]) -> FoundRun:
    run, reason = entry["run"], entry["reason"]
    if Path(run).name != run or "\0" in run or not isinstance(entry["number"], int):
        raise ValueError("a trial's run is a folder inside of the sweep's")
    trial = Trial(
        sweep,
        entry["number"],
        str(entry["state"]),
        number_or_none(entry["value"]),
        dict(entry["params"]),
        None if reason is None else str(reason),
    )
    return FoundRun(sweep.path / run, _is_run(sweep.path / run), trial)
