"""sweep.json: the trials of a sweep and their results, for `report`, `action=best` and users' scripts."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NotRequired

from optuna.trial import FrozenTrial
from pydantic import FiniteFloat, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from qwlit.config.run import RunConfig, recipe_settings
from qwlit.core.errors import ConfigError
from qwlit.core.files import load_json, locked, read_small_text, write_json_atomic
from qwlit.core.metric import Metric
from qwlit.data.config import parts_of
from qwlit.training.tracking.run_folder import RunFolder
from qwlit.tuning.study import Study
from qwlit.tuning.sweep_file import Sweep
from qwlit.tuning.trial import name_of

RECORD = "sweep.json"


class TrialEntry(TypedDict):
    """A trial in sweep.json."""

    number: int
    state: str | None
    """done, pruned, failed, diverged or running"""
    value: FiniteFloat | None
    params: dict[str, Any]
    run: str
    reason: str | None
    steps: int | None


class Record(TypedDict):
    """What sweep.json holds; the entries of `header` that no other function here reads are not listed."""

    name: str
    metric: Metric
    trials: list[TrialEntry]
    best: int | None
    file: NotRequired[dict[str, Any]]
    settings: NotRequired[dict[str, Any]]


# Entries of the sweep file that may change when a sweep resumes: they do not change its trials.
NOT_COMPARED = ("name", "description", "project", "entity", "run_cap", "command")


def header(name: str, sweep: Sweep, config: RunConfig, overrides: list[str]) -> dict[str, Any]:
    """Return the entries of sweep.json that never change. `overrides` are those of every trial (key "words")."""
    metric = sweep.document.metric
    entries = {
        "name": name,
        "method": sweep.document.method,
        "metric": {"name": metric.name, "goal": metric.goal},
        "seed": config.seed,
        "words": overrides,
        "file": {key: value for key, value in sweep.raw.items() if key not in NOT_COMPARED},
        "settings": recipe_settings(config) | _compared(config),
    }
    # Turn tuples into lists, so that the entries equal those read back from JSON.
    plain: dict[str, Any] = json.loads(json.dumps(entries))
    return plain


def _compared(config: RunConfig) -> dict[str, Any]:
    """Return the other settings that must be equal, or the trials' values could not be compared."""
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


def _entry(folder: Path, metric: Metric, trial: FrozenTrial) -> dict[str, Any]:
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
    """Read sweep.json.

    Raises:
        ConfigError: the file is missing, broken, or no record of a sweep.
    """
    try:
        text = read_small_text(folder / RECORD)
        record: dict[str, Any] = load_json(text)
        TypeAdapter(Record).validate_json(text, strict=True)
    except FileNotFoundError:
        raise ConfigError(f"{folder} holds no sweep; run it first, or name it by run.name=… and run.root=…") from None
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"])) or "it"
        raise ConfigError(
            f"{folder / RECORD} is not the record of a sweep: {where} is of another kind; copy the folder again, or set"
            " another run.name"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / RECORD} cannot be read: {error}") from None
    return record


def steps_made(folder: Path) -> int:
    """Return the sum of the steps of all trials, as a measure of progress."""
    return sum(trial["steps"] or 0 for trial in read_record(folder)["trials"]) if (folder / RECORD).exists() else 0


def refuse_other_sweep(folder: Path, head: dict[str, Any]) -> None:
    """Refuse to resume another sweep than the one in the folder.

    Raises:
        ConfigError: the folder holds something else, or a sweep with another file, seed or other settings.
    """
    if not (folder / RECORD).exists():
        if (folder / "journal.log").exists() or not any(folder.iterdir()):
            return  # the sweep was killed before it wrote sweep.json
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
