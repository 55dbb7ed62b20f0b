"""RunConfig: all settings of a run. Each section is defined beside the code that uses it."""

import hashlib
from dataclasses import asdict, field, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args

from qwlit.config.settings import GenerationSettings, PreflightConfig, RunSettings, SlurmConfig
from qwlit.core.schema import NonNegativeInt, config_dataclass
from qwlit.data.config import DataConfig, parts_of
from qwlit.model.config import AdapterConfig, DropoutConfig, FreezeConfig, ModelConfig
from qwlit.optim.config import OptimConfig, SchedulerConfig
from qwlit.training.config import (
    CheckpointConfig,
    Determinism,
    GuardConfig,
    HardwareConfig,
    LoggerConfig,
    LoggingConfig,
    ProfileConfig,
    TraceConfig,
    TrainConfig,
    ValidationConfig,
)


@config_dataclass
class RunConfig:
    """Settings of one run."""

    run: RunSettings
    seed: NonNegativeInt
    """Seeds the weights, the order of samples and dropout."""
    resume: Literal["auto", "never"]
    """auto: resume an unfinished run of this name. never: keep it under another name and start a new one."""
    determinism: Determinism
    """fast: no constraint. reproducible: same machine, same numbers. strict: also float32 and eager attention."""
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig
    scheduler: SchedulerConfig
    dropout: DropoutConfig
    freeze: FreezeConfig
    adapter: AdapterConfig
    guard: GuardConfig
    hardware: HardwareConfig
    validation: ValidationConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    logger: LoggerConfig
    preflight: PreflightConfig
    profile: ProfileConfig
    trace: TraceConfig
    slurm: SlurmConfig
    # Runs of earlier versions have no such section in their config.yaml.
    generation: GenerationSettings = field(default_factory=GenerationSettings)


@lru_cache
def setting_names(owner: Any = RunConfig, prefix: str = "") -> frozenset[str]:
    """Return the dotted names of all settings that have a value, without those of sections."""
    names: set[str] = set()
    for setting in fields(owner):
        members = get_args(setting.type) if isinstance(setting.type, UnionType) else (setting.type,)
        section: Any = next((member for member in members if is_dataclass(member)), None)
        name = prefix + setting.name
        names |= setting_names(section, f"{name}.") if section else {name}
    return frozenset(names)


RECIPE_SECTIONS = ("seed", "model", "data", "train", "optim", "scheduler", "dropout", "freeze", "adapter")
"""Sections of the recipe, the settings that decide what is computed. A run resumes only with the same values."""
NOT_IN_RECIPE = {
    # Data are compared by their content, so the path may change.
    "data.path",
    "data.val_path",
    "data.strict",
    "data.max_bad_ratio",
    "data.exact_match",
    "model.attention",
    # The weights are compared by their content as well.
    "model.hub",
}
"""Settings in these sections that do not belong to the recipe."""
VAL_SETS = "data.val_path."
"""Beginning of the keys of named validation sets, which do not belong to the recipe either."""
FOLDERS = {"model.path", "model.adapter_path", "model.tokenizer"}
"""Settings of which only the last part of the path is compared: a run can resume on a machine with other folders."""


def recipe_settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings of the recipe, as dotted key → value."""
    tree = asdict(config)
    values = flatten({section: tree[section] for section in RECIPE_SECTIONS})
    kept = {key: value for key, value in values.items() if not (key in NOT_IN_RECIPE or key.startswith(VAL_SETS))}
    kept["data.path's weights"] = [part.weight for part in parts_of(config.data.path)]
    return {key: Path(value).name if key in FOLDERS and value else value for key, value in kept.items()}


def recipe_fingerprint(config: RunConfig) -> str:
    """Return a hash of the recipe's settings that are on: a new setting of a later version is off, and changes none."""
    switched_on = {key: value for key, value in recipe_settings(config).items() if value}
    return hashlib.sha256(repr(sorted(switched_on.items())).encode()).hexdigest()[:16]


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dicts as dotted key → value."""
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): tree}
    return {key: value for name, item in tree.items() for key, value in flatten(item, f"{prefix}{name}.").items()}
