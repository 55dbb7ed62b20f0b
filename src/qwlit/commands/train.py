"""`train`: trains a model, or resumes an unfinished run."""

from qwlit.commands.help import train_help
from qwlit.config.compose import compose, dump
from qwlit.core.errors import ConfigError, nearest


def main(arguments: list[str]) -> int:
    if any(word in ("-h", "--help") for word in arguments):
        print(train_help(), end="")
        return 0
    overrides, show_config = _split_options(arguments)
    composed = compose(overrides)
    if show_config:
        print(dump(composed.config), end="")
    else:
        from qwlit.run.training_run import train

        train(composed)
    return 0


def _split_options(arguments: list[str]) -> tuple[list[str], bool]:
    """Take `--cfg job` out of the words; everything else is an override."""
    words = list(arguments)
    show_config = "--cfg" in words
    if show_config:
        at = words.index("--cfg")
        if words[at + 1 : at + 2] != ["job"]:
            raise ConfigError("--cfg takes one word: --cfg job prints the composed settings")
        del words[at : at + 2]
    for word in words:
        if word.startswith("-"):
            raise ConfigError(f"{word}: no such option.{nearest(word, ['--help', '--cfg'])} Settings are key=value")
    return words, show_config
