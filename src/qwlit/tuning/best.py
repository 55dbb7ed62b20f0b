"""Write the best trial as an experiment file, so that `train experiment=…` trains it again."""

import re
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from qwlit.config.compose import as_tree, compose
from qwlit.config.groups import group_options
from qwlit.config.run import RunConfig, flatten
from qwlit.core.errors import ConfigError, one_line
from qwlit.core.files import read_json, read_json_lines, write_text_atomic
from qwlit.core.metric import Metric
from qwlit.training.tracking.run_folder import FINISHED, RunFolder
from qwlit.tuning.record import RECORD, read_record
from qwlit.tuning.space import format_overrides
from qwlit.tuning.sweep_file import Sweep
from qwlit.tuning.trial import name_of, values_in

# These sections say where a run is stored, logged and queued; they are no part of an experiment.
NOT_TAKEN = {"run", "logger", "slurm"}
# The written file is an experiment, so it must not choose an experiment.
NO_GROUPS = NOT_TAKEN | {"experiment"}


def write_best(folder: Path, sweep: Sweep, overrides: list[str]) -> tuple[Path, list[str]]:
    """Write `<folder>/conf/experiment/<name>_best.yaml`. Return the file, and overrides with the same effect.

    Args:
        overrides: as typed. Only `hydra.searchpath` is used: the trial's group choices may be files found there.

    Raises:
        ConfigError: no trial of the sweep finished with a value, or the folder of the best one is broken.
    """
    metric = sweep.document.metric
    run, value = _recorded_best(folder) if (folder / RECORD).exists() else _best_of_runs(folder, metric)
    config = compose([f"config={run.config_file}"]).config
    choices = _choices(run.path / "manifest.json")
    searchpath = [override for override in overrides if override.startswith("hydra.searchpath=")]
    groups, settings = fewest_overrides(choices, config, searchpath)
    # Hydra reads experiment=a,b as two choices.
    name = re.sub(r"[^\w.-]", "_", folder.name)
    file = folder / "conf" / "experiment" / f"{name}_best.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    # A comment in the file: a second line would be a setting.
    title = one_line(f"The best of sweep {folder.name}: {run.path.name}, {metric.name} {value:.6g}.")
    write_text_atomic(file, as_experiment(groups, settings, title))
    return file, [f"{name}={choice}" for name, choice in groups.items()] + format_overrides(settings)


def _choices(manifest: Path) -> dict[str, str]:
    """Return the group choices in a run's manifest.json.

    Raises:
        ConfigError: it has none, or other groups.
    """
    choices = read_json(manifest).get("choices")
    if not isinstance(choices, dict) or not (
        choices.keys() <= group_options().keys() and all(isinstance(choice, str | None) for choice in choices.values())
    ):
        raise ConfigError(f"{manifest} does not hold the choices of a run of qwlit; copy the run's folder again")
    return {group: choice for group, choice in choices.items() if choice is not None}


def _recorded_best(folder: Path) -> tuple[RunFolder, float]:
    record = read_record(folder)
    best = next((trial for trial in record["trials"] if trial["number"] == record["best"]), None)
    if best is None or best["value"] is None:
        states = sorted({str(trial["state"]) for trial in record["trials"]}) or ["none"]
        raise ConfigError(f"{folder} has no finished trial yet (states: {', '.join(states)}); run the sweep first")
    return RunFolder(folder / name_of(best["number"])), best["value"]


def _best_of_runs(folder: Path, metric: Metric) -> tuple[RunFolder, float]:
    """Return the best trial of a W&B sweep among its runs on this machine, with its value."""
    runs = [RunFolder(path) for path in sorted(folder.glob("*"))]
    values = {run: value for run in runs if run.status == FINISHED and (value := _value(run, metric)) is not None}
    best = metric.best(values.values())
    if best is None:
        raise ConfigError(f"{folder} holds no sweep with a finished trial; name the sweep by run.name=… and run.root=…")
    return next(run for run, value in values.items() if value == best), best


def _value(run: RunFolder, metric: Metric) -> float | None:
    return metric.best_of_run(values_in(read_json_lines(run.path / "metrics.jsonl"), metric), run.read_summary())


def fewest_overrides(
    choices: dict[str, str], config: RunConfig, searchpath: list[str]
) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the fewest group choices and single settings that turn the defaults into `config`."""
    own_data = choices.get("data") == "files"
    groups = {"data": "files"} if own_data else {}
    data = ["data.path=x"] if own_data else []

    def composed() -> Any:
        return compose([*searchpath, *(f"{name}={choice}" for name, choice in groups.items()), *data])

    # The recipe first, because it chooses other groups.
    for name in sorted(choices.keys() - NO_GROUPS, key=lambda name: (name != "recipe", name)):
        if composed().choices.get(name) != choices[name]:
            groups[name] = choices[name]
    before, after = (_settings(c) for c in (composed().config, config))
    # Always write data.path, which was the placeholder x, and the warm-up cap, which a typed warm-up would lift.
    always = ({"data.path"} if own_data else set()) | {"scheduler.max_warmup_ratio"}
    settings = {key: value for key, value in after.items() if before.get(key) != value or key in always}
    if "data.path" in settings:
        # data.path without a data group would also replace the demo's validation set.
        groups.setdefault("data", choices.get("data", "files"))
    return groups, settings


def _settings(config: RunConfig) -> dict[str, Any]:
    return flatten({name: section for name, section in as_tree(config).items() if name not in NOT_TAKEN})


def as_experiment(groups: dict[str, str], settings: dict[str, Any], title: str) -> str:
    """Write the overrides as a file of the group `experiment`."""
    defaults = [{f"override /{name}": choice} for name, choice in groups.items()]
    tree = OmegaConf.create({"defaults": [*defaults, "_self_"]})
    for key, value in settings.items():
        OmegaConf.update(tree, key, value, force_add=True)
    text = yaml.safe_dump(OmegaConf.to_container(tree), sort_keys=False, allow_unicode=True)
    return f"# @package _global_\n# {title}\n{text}"
