"""What a user can set about checkpoints."""

from qwlit.core.schema import Flag, PositiveInt, config_dataclass


@config_dataclass
class CheckpointConfig:
    """When the run is saved. The last step and the best val/loss always are."""

    every_steps: PositiveInt | None = None
    """Save every so many steps."""
    each_epoch: Flag = True
    """Save at the end of each epoch."""
    keep_last: PositiveInt = 2
    """Newest checkpoints kept, beside the best one."""
