"""The best trial as an experiment file: what `train experiment=…` needs to train it again."""

from pathlib import Path
from typing import Any

import yaml

from qwlit.config.compose import compose, dump, group_options
from qwlit.core.errors import ConfigError
from qwlit.core.files import write_text_atomic
from qwlit.tuning.record import read_record
from qwlit.tuning.space import as_words

# Where a run lies and logs is not what it is; where its data lie must be said, as they replace the demo's.
PLACES = ("run.", "logger")
DATA = ("data.path", "data.val_path")


def write_best(folder: Path) -> tuple[Path, list[str]]:
    """Write `<folder>/conf/experiment/<name>_best.yaml`; return it, and the overrides that say the same.

    Raises:
        ConfigError: no trial of the sweep has ended well.
    """
    record = read_record(folder)
    if record["best"] is None:
        states = sorted({str(trial["state"]) for trial in record["trials"]}) or ["none"]
        raise ConfigError(f"{folder} has no trial that ended well yet (states: {', '.join(states)})")
    best = next(trial for trial in record["trials"] if trial["number"] == record["best"])
    typed = {word.partition("=")[0]: word for word in (*record["words"], *as_words(best["params"]))}
    words = [word for key, word in typed.items() if not key.startswith(PLACES)]
    file = folder / "conf" / "experiment" / f"{record['name']}_best.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    came_from = f"{record['metric']['name']} {best['value']:.6g}, trial {best['number']} of {len(record['trials'])}"
    write_text_atomic(file, as_experiment(words, f"The best of sweep {record['name']}: {came_from}."))
    return file, words


def as_experiment(words: list[str], title: str) -> str:
    """Turn overrides into an experiment file that composes to the same run."""
    composed = compose(words)
    typed = {key: value for key, _, value in (word.partition("=") for word in words)}
    groups = {name: composed.choices[name] for name in group_options() if name in typed and name != "experiment"}
    if typed.keys() & set(DATA):
        groups["data"] = composed.choices["data"]
    data = [f"{key}={typed[key]}" for key in DATA if key in typed]
    inner = composed.choices.get("experiment")
    chosen = [f"{name}={choice}" for name, choice in groups.items()] + ([f"experiment={inner}"] if inner else [])
    before, after = (yaml.safe_load(dump(compose([*w, "run.name=x"]).config)) for w in ([*chosen, *data], words))
    tree: dict[str, Any] = {"defaults": ([inner] if inner else [])}
    tree["defaults"] += [{f"override /{name}": choice} for name, choice in groups.items()] + ["_self_"]
    changed = _changed(before, after)
    for key in DATA:
        if key in typed:
            section, name = key.split(".")
            changed.setdefault(section, {})[name] = after[section][name]
    changed.pop("run", None)
    text = yaml.safe_dump(tree | changed, sort_keys=False, allow_unicode=True)
    return f"# @package _global_\n# {title}\n{text}"


def _changed(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return the part of `after` that differs; lists as wholes."""
    found: dict[str, Any] = {}
    for key, value in after.items():
        if isinstance(value, dict) and isinstance(before.get(key), dict):
            inner = _changed(before[key], value)
            if inner:
                found[key] = inner
        elif before.get(key) != value:
            found[key] = value
    return found
