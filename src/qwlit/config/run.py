"""RunConfig: every setting of a run, each beside the component that owns it."""

from typing import Literal

from qwlit.core.schema import NonNegativeInt, config_dataclass
from qwlit.data.config import DataConfig
from qwlit.model.config import AdapterConfig, DropoutConfig, ModelConfig
from qwlit.optim.config import OptimConfig, SchedulerConfig
from qwlit.training.config import (
    CheckpointConfig,
    GuardConfig,
    HardwareConfig,
    LoggingConfig,
    ProfileConfig,
    RunSettings,
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
    """auto: go on with an unfinished run of this name. never: set it aside and start anew."""
    determinism: Literal["fast", "reproducible", "strict"]
    """fast: nothing forced. reproducible: same machine, same numbers. strict: also float32 and eager attention."""
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig
    scheduler: SchedulerConfig
    dropout: DropoutConfig
    adapter: AdapterConfig
    guard: GuardConfig
    hardware: HardwareConfig
    validation: ValidationConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    profile: ProfileConfig


MATHEMATICS = ("seed", "model", "data", "train", "optim", "scheduler", "dropout", "adapter")
"""Sections that shape what is computed: a run goes on only with the same ones."""
