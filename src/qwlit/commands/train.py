"""`train`: trains a model, or resumes an unfinished run."""

from qwlit.commands.options import compose_run
from qwlit.config.compose import dump
from qwlit.core.errors import ConfigError, nearest


def main(arguments: list[str]) -> None:
    overrides, show_config = _split_options(arguments)
    composed = compose_run(overrides)
    if show_config:
        print(dump(composed.config), end="")
    else:
        from qwlit.run.training_run import train

        train(composed)


def _split_options(arguments: list[str]) -> tuple[list[str], bool]:
    """Separate `--cfg job` from the overrides. Return the overrides, and whether to print the settings only."""
    overrides = list(arguments)
    show_config = "--cfg" in overrides
    if show_config:
        at = overrides.index("--cfg")
        if overrides[at + 1 : at + 2] != ["job"]:
            raise ConfigError("--cfg takes one value: --cfg job prints the composed settings")
        del overrides[at : at + 2]
    for override in overrides:
        if override.startswith("-"):
            hint = nearest(override, ["--help", "--cfg"])
            raise ConfigError(f"{override}: no such option.{hint} Settings are key=value")
    return overrides, show_config
