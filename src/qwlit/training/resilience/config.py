"""What a user can set about the guard."""

from qwlit.core.schema import PositiveInt, config_dataclass


@config_dataclass
class GuardConfig:
    """What happens when a step's loss or gradient is not finite: the optimizer skips it, and the run may stop."""

    max_nonfinite_steps: PositiveInt = 3
    """Stop with exit code 3 after so many such steps in a row."""
