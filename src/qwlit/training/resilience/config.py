"""Settings of the guard."""

from qwlit.core.schema import PositiveInt, config_dataclass


@config_dataclass
class GuardConfig:
    """When the run stops: the optimizer skips each step whose loss or gradient is not finite."""

    max_nonfinite_steps: PositiveInt = 3
    """Stop with exit code 3 after this many such steps in a row."""
