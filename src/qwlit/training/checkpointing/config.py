"""Settings of checkpoints."""

from qwlit.core.schema import Flag, PositiveInt, config_dataclass


@config_dataclass
class CheckpointConfig:
    """When the run is saved. The last step and the best val/loss are always saved."""

    every_steps: PositiveInt | None = None
    """Save after every this many steps."""
    each_epoch: Flag = True
    """Save at the end of each epoch."""
    keep_last: PositiveInt = 2
    """How many of the newest checkpoints are kept, besides the best one."""
