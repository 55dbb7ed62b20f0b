"""One run, read from its folder. Missing and broken files are read as empty."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from qwlit.config.run import flatten
from qwlit.core.files import read_json, read_json_lines
from qwlit.core.metric import Metric, number_or_none
from qwlit.core.yaml_files import read_yaml
from qwlit.report.find import FoundRun, Trial
from qwlit.training.checkpointing.manifest import ROLLBACK
from qwlit.training.tracking.run_folder import FINISHED, METRICS, ROLLED_BACK, RunFolder

VAL_LOSS = Metric(name="val/loss")
Series = list[tuple[int, float]]
"""(step, value) pairs; values that are not finite numbers are left out."""

PATHS = {"path", "val_path", "tokenizer"}
"""Last parts of the settings that name files: only the file name is compared, the folder differs between machines."""
UNFINISHED = ("running", "killed")
"""With these statuses, summary.json still has the results of an earlier attempt."""


@dataclass(frozen=True)
class RunResults:
    """The results of a run; None if not known."""

    val_loss: float | None
    """The lowest."""
    train_loss: float | None
    """The last."""
    exact_match: float | None
    steps: int | None
    wall_seconds: float | None
    tokens_per_second: float | None
    peak_memory_gib: float | None


@dataclass(frozen=True)
class RunRecord:
    """A run, or a trial that ended before it had a folder (`exists` is False)."""

    name: str
    path: Path
    exists: bool
    trial: Trial | None
    status: str
    settings: Mapping[str, Any]
    """Dotted key → value, without run.*; of a path, only the file name."""
    manifest: Mapping[str, Any]
    summary: Mapping[str, Any]
    series: Mapping[str, Series]
    events: tuple[Mapping[str, Any], ...]
    results: RunResults
    evaluation: Mapping[str, Any]
    """The newest one, see `report.evaluated`."""

    @property
    def finished(self) -> bool:
        """Whether the run finished all its steps."""
        return (self.trial.state if self.trial else self.status) == FINISHED

    def value(self, metric: Metric) -> float | None:
        """Return the best value of the metric: from the sweep, else metrics.jsonl, else summary.json."""
        if self.trial is not None and self.trial.value is not None and self.trial.sweep.metric == metric:
            return self.trial.value
        if metric == VAL_LOSS:
            return self.results.val_loss
        return metric.best_of_run((value for _, value in self.series.get(metric.name, ())), self.summary)

    @cached_property
    def undone(self) -> list[dict[str, Series]]:
        """The metrics of the steps that the run went back over, one entry for each time it went back."""
        undone: dict[Any, list[dict[str, Any]]] = {}
        for record in read_json_lines(self.path / ROLLED_BACK):
            if record.get("file") == METRICS:
                undone.setdefault(str(record.get("rollback")), []).append(record)
        return [_series(records) for records in undone.values()]

    @property
    def decisions(self) -> list[Mapping[str, Any]]:
        """The decisions to go back, oldest first: the newest event lists those before it, whose events may be gone."""
        last: Mapping[str, Any] = next((event for event in reversed(self.events) if event["event"] == ROLLBACK), {})
        before = last.get("before")
        found = [*(before if isinstance(before, list) else []), last.get("decision")]
        return [decision for decision in found if isinstance(decision, Mapping)]

    def count(self, event: str) -> int:
        return sum(record.get("event") == event for record in self.events)

    def last_step(self, event: str) -> int | None:
        steps = [record["step"] for record in self.events if record.get("event") == event]
        return steps[-1] if steps else None


def read_runs(found: Iterable[FoundRun]) -> list[RunRecord]:
    found = list(found)
    return [_read(run, name) for run, name in zip(found, _names(found), strict=True)]


def _names(found: list[FoundRun]) -> list[str]:
    """Name each run by its folder. If two runs share a name, use as many parent folders as make the names unique."""
    parts = [run.path.absolute().parts for run in found]
    depth = 1
    while len({path[-depth:] for path in parts}) < len(parts):
        depth += 1
    return ["/".join(path[-depth:]) for path in parts]


def _read(found: FoundRun, name: str) -> RunRecord:
    path, trial = found.path, found.trial
    params = dict(trial.params) if trial else {}
    summary = RunFolder(path).read_summary()
    status = _status(path, summary)
    series = _series(read_json_lines(path / "metrics.jsonl"))
    return RunRecord(
        name=name,
        path=path,
        exists=found.exists,
        trial=trial,
        status=trial.state if trial and (trial.state != "running" or not found.exists) else status,
        settings=_settings(params) | _settings(_tree(path / "config.yaml")),
        manifest=_manifest(path / "manifest.json"),
        summary=summary,
        series=series,
        events=tuple(event for event in read_json_lines(path / "events.jsonl") if _is_event(event)),
        results=_results({} if status in UNFINISHED else summary, series),
        evaluation=read_json(path / "evaluation.json"),
    )


def _status(path: Path, summary: Mapping[str, Any]) -> str:
    """Return the status. A run whose summary says "running" while no process holds its lock was killed."""
    status = summary.get("status")
    if status != "running":
        return str(status or "unknown")
    try:
        return "running" if RunFolder(path.absolute()).is_in_use else "killed"
    except OSError:
        # Another user's run, or a file server that does not answer.
        return "running"


def _manifest(file: Path) -> dict[str, Any]:
    kinds = {"choices": dict, "packages": dict, "devices": int, "num_nodes": int}
    return {key: value for key, value in read_json(file).items() if isinstance(value, kinds.get(key, object))}


def _is_event(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("event"), str) and isinstance(record.get("step"), int)


def _tree(file: Path) -> dict[str, Any]:
    """Read config.yaml without checking it: it may be from another version of qwlit."""
    try:
        tree = read_yaml(file, yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _settings(tree: Mapping[str, Any]) -> dict[str, Any]:
    settings = flatten({key: value for key, value in tree.items() if key != "run"})
    return {
        key: _last_part(value) if not PATHS.isdisjoint(key.split(".")) else value for key, value in settings.items()
    }


def _last_part(value: Any) -> Any:
    if isinstance(value, list):
        return [_last_part(item) for item in value]
    if isinstance(value, dict):
        return value | {"path": _last_part(value.get("path"))}
    return Path(value).name if isinstance(value, str) else value


def _series(records: Iterable[Mapping[str, Any]]) -> dict[str, Series]:
    series: dict[str, Series] = {}
    for record in records:
        step = record.get("step")
        if isinstance(step, int):
            for key, value in record.items():
                if key != "step" and (number := number_or_none(value)) is not None:
                    series.setdefault(key, []).append((step, number))
    return series


def _results(summary: Mapping[str, Any], series: Mapping[str, Series]) -> RunResults:
    """Take each result from the summary, or compute it from the metrics if the summary lacks it."""

    def values(key: str) -> list[float]:
        return [value for _, value in series.get(key, ())]

    def known(entry: str, computed: float | None) -> float | None:
        recorded = number_or_none(summary.get(entry))
        return computed if recorded is None else recorded

    speeds = values("throughput/tokens_per_second")
    steps = known("steps", max((points[-1][0] for points in series.values()), default=None))
    return RunResults(
        val_loss=known("val_loss_best", min(values("val/loss"), default=None)),
        train_loss=known("train_loss_last", next(reversed(values("train/loss")), None)),
        exact_match=known("exact_match", None),
        steps=None if steps is None else int(steps),
        wall_seconds=known("wall_seconds", None),
        tokens_per_second=known("tokens_per_second", sum(speeds) / len(speeds) if speeds else None),
        peak_memory_gib=known("peak_memory_gib", max(values("memory/peak_gib"), default=None)),
    )
