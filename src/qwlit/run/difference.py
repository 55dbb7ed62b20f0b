"""Where two runs part: the first step and quantity, and what their manifests do not share."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from qwlit.config.compose import compose
from qwlit.config.overrides import format_value
from qwlit.config.run import flatten
from qwlit.core.errors import ConfigError, QwlitError, first_line
from qwlit.core.files import read_json
from qwlit.core.yaml_files import read_yaml
from qwlit.planning.run_plan import build_plan
from qwlit.run.verify import Difference, differing_entries, first_difference, read_steps

MEANING = {
    "samples": "the data: the steps train on other samples",
    "loss_sum": "the forward pass, or the weights before the step: samples are the same, the loss is not",
    "grad_norm": "the backward pass: samples and loss are the same, the gradient norm is not",
    "parameters": "the optimizer step: samples, loss and gradient norm are the same, the weights are not",
}
SHAPE = "model.architecture."
LOGGED = ("train/loss", "optim/grad_norm", "val/loss")
"""Compared where a run has no trace, at the steps that both have logged."""


@dataclass(frozen=True)
class RunDifference:
    """How far two runs are the same."""

    compared_steps: int
    to_the_bit: bool
    """Whether the traces were compared; else the numbers of metrics.jsonl."""
    difference: Difference | None
    last_equal_step: int | None
    """The last compared step, before the difference if there is one; None if the first one differs."""
    circumstances: list[str]
    """Entries of manifest.json and settings that differ, in words."""

    @property
    def meaning(self) -> str:
        """Where in the step the runs part."""
        assert self.difference is not None
        return MEANING.get(self.difference.quantity, "the numbers that were logged")


def compare_runs(first: Path, second: Path) -> RunDifference:
    """Compare two run folders.

    Raises:
        ConfigError: they have no step in common.
    """
    traces = [read_steps(run / "trace.jsonl") for run in (first, second)]
    to_the_bit = all(traces)
    records = traces if to_the_bit else [_logged(run) for run in (first, second)]
    steps, difference = first_difference(records, None if to_the_bit else LOGGED)
    if not steps:
        raise ConfigError(f"{first} and {second} have no step in common; train with trace.every_steps=1 to compare all")
    common = sorted(set.intersection(*({record["step"] for record in run} for run in records)))
    before = [step for step in common if difference is None or step < difference.step]
    manifests = [read_json(run / "manifest.json") for run in (first, second)]
    last = before[-1] if before else None
    circumstances = [*differing_entries(*manifests), *_differing_settings(first, second)]
    return RunDifference(steps, to_the_bit, difference, last, circumstances)


def _differing_settings(first: Path, second: Path) -> list[str]:
    """Return in words the settings that differ, without names and folders of the runs.

    Raises:
        ConfigError: a config.yaml is damaged.
    """
    one, other = (_settings(run / "config.yaml") for run in (first, second))
    # The manifests have the seed too.
    keys = sorted(key for key in one.keys() | other.keys() if not key.startswith(("run.", "seed")))
    differing = [key for key in keys if one.get(key) != other.get(key)]
    # A model from a folder has its architecture there, and every setting of model.architecture is null.
    shapes = [key for key in differing if key.startswith(SHAPE) and None in (one.get(key), other.get(key))]
    found = [
        f"{key} {format_value(one.get(key))} against {format_value(other.get(key))}"
        for key in differing
        if key not in shapes
    ]
    if shapes:
        run = first if one.get(shapes[0]) is None else second
        found.append(
            f"model.architecture of {run} is that of its model's folder; the other run sets {len(shapes)} of its keys"
        )
    return found


def _settings(file: Path) -> dict[str, Any]:
    try:
        tree = read_yaml(file, yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read: {first_line(error)}; restore it") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} holds no settings; restore it")
    return flatten(tree)


def _logged(run: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl, one for each step."""
    by_step: dict[int, dict[str, Any]] = {}
    for record in read_steps(run / "metrics.jsonl"):
        by_step.setdefault(record["step"], {}).update(record)
    return list(by_step.values())


SAMPLES_NAMED = 3


def differing_samples(runs: Sequence[Path], step: int) -> list[str]:
    """Return in words on which samples a step trains in only one of two runs.

    Args:
        step: counted from 1.
    """
    try:
        plans = [build_plan(compose([f"config={run / 'config.yaml'}"]), Console(quiet=True)) for run in runs]
    except QwlitError as error:
        return [f"the samples cannot be named: {error}"]
    origins = []
    for plan in plans:
        steps = plan.planned_data.steps.step_plan
        origins.append([steps.train.origin(sample) for sample in steps.samples(step - 1).tolist()])
    if sorted(origins[0]) == sorted(origins[1]):
        return [f"step {step} trains on the same {len(origins[0])} samples in another order, or after a rollback"]
    found = []
    for run, own, other in zip(runs, origins, reversed(origins), strict=True):
        only = [origin for origin in own if origin not in other]
        more = f" and {len(only) - SAMPLES_NAMED} more" if len(only) > SAMPLES_NAMED else ""
        found.append(f"only {run} trains on {', '.join(only[:SAMPLES_NAMED])}{more}")
    return found
