"""sweep.json: what a sweep has tried and what came of it, for `report`, for `action=best` and for people's scripts."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwlit.config.run import RunConfig, mathematics
from qwlit.core.errors import ConfigError
from qwlit.core.files import locked, write_json_atomic
from qwlit.data.config import parts_of
from qwlit.training.tracking.run_folder import RunFolder
from qwlit.tuning.study import Study
from qwlit.tuning.sweep_file import Metric, Sweep
from qwlit.tuning.trial import name_of

RECORD = "sweep.json"
# What changes nothing about which trials there are.
NOT_COMPARED = ("name", "description", "project", "entity", "run_cap", "command")


def header(name: str, sweep: Sweep, config: RunConfig, words: list[str]) -> dict[str, Any]:
    """Return what of a sweep never changes; `words` are the overrides that every trial has."""
    metric = sweep.document.metric
    entries = {
        "name": name,
        "method": sweep.document.method,
        "metric": {"name": metric.name, "goal": metric.goal},
        "seed": config.seed,
        "words": words,
        "file": {key: value for key, value in sweep.raw.items() if key not in NOT_COMPARED},
        "settings": mathematics(config) | _compared(config),
    }
    # As it will be read again: JSON knows no tuples.
    plain: dict[str, Any] = json.loads(json.dumps(entries))
    return plain


def _compared(config: RunConfig) -> dict[str, Any]:
    """Return what beside the mathematics must be alike, or values could not be compared."""
    data, validation = config.data, config.validation
    return {
        "data.path": [asdict(part) for part in parts_of(data.path)],
        "data.val_path": [asdict(part) for part in parts_of(data.val_path)],
        "model.path": config.model.path,
        "validation.every_steps": validation.every_steps,
        "validation.each_epoch": validation.each_epoch,
        "determinism": config.determinism,
        "hardware.precision": config.hardware.precision,
    }


def write_record(folder: Path, head: dict[str, Any], study: Study) -> list[dict[str, Any]]:
    """Write sweep.json and return its trials."""
    with locked(folder / ".record.lock"):
        metric = Metric(**head["metric"])
        trials = [_entry(folder, metric, trial) for trial in study.trials]
        values = {trial["number"]: trial["value"] for trial in trials if trial["state"] == "done"}
        best = next((number for number, value in values.items() if value == metric.best(values.values())), None)
        write_json_atomic(folder / RECORD, head | {"trials": trials, "best": best})
    return trials


def _entry(folder: Path, metric: Metric, trial: Any) -> dict[str, Any]:
    name = name_of(trial.number)
    summary = RunFolder(folder / name).read_summary()
    outcome = trial.user_attrs.get("outcome") if trial.state.is_finished() else "running"
    return {
        "number": trial.number,
        "state": outcome,
        "value": trial.value if outcome == "done" else metric.best(trial.intermediate_values.values()),
        "params": trial.params,
        "run": name,
        "reason": trial.user_attrs.get("reason"),
        "steps": summary.get("steps"),
    }


def read_record(folder: Path) -> dict[str, Any]:
    """Read a sweep's sweep.json.

    Raises:
        ConfigError: there is none, or it is broken.
    """
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{folder} holds no sweep; run it first, or name it by run.name=… and run.root=…") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / RECORD} cannot be read: {error}") from None
    if not isinstance(record, dict) or not {"name", "metric", "trials", "best"} <= record.keys():
        raise ConfigError(f"{folder / RECORD} is no sweep's record")
    return record


def steps_made(folder: Path) -> int:
    """Return the steps of all trials: what a sweep has come to."""
    return sum(trial["steps"] or 0 for trial in read_record(folder)["trials"]) if (folder / RECORD).exists() else 0


def refuse_other_sweep(folder: Path, head: dict[str, Any]) -> None:
    """Go on only with the sweep that the folder holds.

    Raises:
        ConfigError: it holds something else, or a sweep of another file, seed or other settings.
    """
    if not (folder / RECORD).exists():
        if (folder / "journal.log").exists() or not any(folder.iterdir()):
            return  # killed at the very beginning
        raise ConfigError(f"{folder} exists and holds no sweep; move it away, or set run.name=…")
    earlier = read_record(folder)
    for part in ("file", "settings"):
        before, now = earlier.get(part, {}), head[part]
        for key in sorted(before | now):
            if before.get(key) != now.get(key):
                raise ConfigError(
                    f"{folder} holds another sweep: {key} was {before.get(key)}, now {now.get(key)};"
                    " set run.name=… for a new one, or delete the folder"
                )
