"""The best trial as an experiment file: what `train experiment=…` needs to train it again."""

import json
from pathlib import Path
from typing import Any

import yaml

from qwlit.config.compose import as_tree, compose
from qwlit.config.run import RunConfig, flatten
from qwlit.core.errors import ConfigError
from qwlit.core.files import write_text_atomic
from qwlit.training.tracking.run_folder import FINISHED, RunFolder
from qwlit.tuning.record import RECORD, read_record
from qwlit.tuning.space import format_overrides
from qwlit.tuning.sweep_file import Metric, Sweep
from qwlit.tuning.trial import best_value

# Where a run lies, logs and waits is not what it is. An experiment is what the others make together.
NOT_TAKEN = {"run", "logger", "slurm"}
NO_GROUPS = NOT_TAKEN | {"experiment"}


def write_best(folder: Path, sweep: Sweep, words: list[str]) -> tuple[Path, list[str]]:
    """Write `<folder>/conf/experiment/<name>_best.yaml`; return it, and the overrides that say the same.

    Args:
        words: as typed; of these `hydra.searchpath` is needed to read the trial's choices again.

    Raises:
        ConfigError: no trial of the sweep has ended well.
    """
    metric = sweep.document.metric
    run, value = _recorded_best(folder) if (folder / RECORD).exists() else _best_of_runs(folder, metric)
    config = compose([f"config={run.config_file}"]).config
    choices = json.loads((run.path / "manifest.json").read_text(encoding="utf-8"))["choices"]
    groups, settings = fewest_overrides(choices, config, [w for w in words if w.startswith("hydra.searchpath=")])
    file = folder / "conf" / "experiment" / f"{folder.name}_best.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    title = f"The best of sweep {folder.name}: {run.path.name}, {metric.name} {value:.6g}."
    write_text_atomic(file, as_experiment(groups, settings, title))
    return file, [f"{name}={choice}" for name, choice in groups.items()] + format_overrides(settings)


def _recorded_best(folder: Path) -> tuple[RunFolder, float]:
    record = read_record(folder)
    best = next((trial for trial in record["trials"] if trial["number"] == record["best"]), None)
    if best is None:
        states = sorted({str(trial["state"]) for trial in record["trials"]}) or ["none"]
        raise ConfigError(f"{folder} has no trial that ended well yet (states: {', '.join(states)})")
    return RunFolder(folder / best["run"]), best["value"]


def _best_of_runs(folder: Path, metric: Metric) -> tuple[RunFolder, float]:
    """Of a W&B sweep: its trials on this machine are the runs in its folder."""
    runs = [RunFolder(path) for path in sorted(folder.glob("*")) if path.is_dir()]
    values = {run: value for run in runs if run.status == FINISHED and (value := best_value(run, metric)) is not None}
    best = metric.best(values.values())
    if best is None:
        raise ConfigError(f"{folder} holds no sweep with a trial that ended well; name it by run.name=… and run.root=…")
    return next(run for run, value in values.items() if value == best), best


def fewest_overrides(
    choices: dict[str, str], config: RunConfig, words: list[str]
) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the fewest group choices, and then settings, that make `config` out of the defaults."""
    own_data = choices.get("data") == "files"
    groups = {"data": "files"} if own_data else {}
    data = ["data.path=x"] if own_data else []

    def composed() -> Any:
        return compose([*words, *(f"{name}={choice}" for name, choice in groups.items()), *data])

    # The recipe first: it chooses others.
    for name in sorted(choices.keys() - NO_GROUPS, key=lambda name: (name != "recipe", name)):
        if composed().choices.get(name) != choices[name]:
            groups[name] = choices[name]
    before, after = (_settings(c) for c in (composed().config, config))
    # The placeholder stood for it; and a typed warm-up lifts the recipe's cap on it.
    said = ({"data.path"} if own_data else set()) | {"scheduler.max_warmup_ratio"}
    settings = {key: value for key, value in after.items() if before.get(key) != value or key in said}
    if "data.path" in settings:
        # Typed alone it would replace the demo's validation set.
        groups.setdefault("data", choices.get("data", "files"))
    return groups, settings


def _settings(config: RunConfig) -> dict[str, Any]:
    return flatten({name: section for name, section in as_tree(config).items() if name not in NOT_TAKEN})


def as_experiment(groups: dict[str, str], settings: dict[str, Any], title: str) -> str:
    """Write the overrides as a file of the group `experiment`."""
    tree: dict[str, Any] = {"defaults": [{f"override /{name}": choice} for name, choice in groups.items()] + ["_self_"]}
    for key, value in settings.items():
        *sections, name = key.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return f"# @package _global_\n# {title}\n{yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)}"
