"""Settings of metrics and loggers."""

from qwlit.core.schema import Flag, PositiveInt, config_dataclass


@config_dataclass
class LoggingConfig:
    """How often a run writes to metrics.jsonl and prints."""

    every_steps: PositiveInt = 10
    """One record after every this many steps; the first and last step always have one."""


WANDB_CONFIG_KEY = "qwlit"
"""The W&B config key that holds all settings: at the top level a sweep's values would overwrite them."""


@config_dataclass
class LoggerConfig:
    """Where metrics go in addition to metrics.jsonl."""

    wandb: Flag = False
    """Log to W&B; offline where no API key is set. Trials of a W&B sweep need it."""
    project: str | None = None
    """W&B project; null: WANDB_PROJECT, else qwlit."""
    entity: str | None = None
    """W&B user or team; null: WANDB_ENTITY, else the account's own."""
    group: str | None = None
    """W&B shows runs of one group together."""
    tags: tuple[str, ...] = ()
    """W&B tags of the run."""
    upload_checkpoints: Flag = False
    """Upload every saved checkpoint as a W&B artifact."""
