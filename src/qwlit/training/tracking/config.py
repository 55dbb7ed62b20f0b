"""What a user can set about metrics and where they go."""

from qwlit.core.schema import Flag, PositiveInt, config_dataclass


@config_dataclass
class LoggingConfig:
    """What is written to metrics.jsonl and shown."""

    every_steps: PositiveInt = 10
    """One line every so many steps; the first and last step always."""


WANDB_CONFIG_KEY = "qwlit"
"""All settings are logged under this one: a sweep's values overwrite W&B's config keys of the same name."""


@config_dataclass
class LoggerConfig:
    """Where metrics go beside metrics.jsonl."""

    wandb: Flag = False
    """Log to W&B; offline where there is no API key. Trials of a W&B sweep need it."""
    project: str | None = None
    """W&B project; null: WANDB_PROJECT, else qwlit."""
    entity: str | None = None
    """W&B user or team; null: WANDB_ENTITY, else the account's own."""
    group: str | None = None
    """Runs that W&B shows together."""
    tags: tuple[str, ...] = ()
    """Words to find the run by."""
    upload_checkpoints: Flag = False
    """Upload every saved checkpoint as a W&B artifact."""
