"""`train`: trains a model, or resumes an unfinished run."""

from qwlit.commands.options import compose_run, own_options
from qwlit.config.compose import dump
from qwlit.core.errors import ConfigError
from qwlit.core.imports import without_collection
from qwlit.model.hub import client_of
from qwlit.training.tracking.loggers import check_named_loggers


def main(arguments: list[str]) -> None:
    at = arguments.index("--cfg") if "--cfg" in arguments else len(arguments)
    shown = arguments[at : at + 2]
    if shown not in ([], ["--cfg", "job"]):
        raise ConfigError("--cfg takes one value: --cfg job prints the composed settings")
    _, overrides = own_options([*arguments[:at], *arguments[at + 2 :]], {})
    composed = compose_run(overrides)
    if shown:
        print(dump(composed.config), end="")
        return
    # A missing package must end the command before torch is imported, which takes seconds.
    check_named_loggers(composed.config.logger)
    client_of(composed.config.model.hub)
    with without_collection():
        from qwlit.run.training_run import train

    train(composed)
