"""Options of a subcommand that are not settings of a run, such as `output=json` of `plan`."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from qwlit.core.errors import ConfigError, nearest

if TYPE_CHECKING:
    from qwlit.config.compose import Composed


def compose_run(overrides: list[str]) -> "Composed":
    """Compose a run and refuse what is wrong in its settings alone, before torch is imported, which takes seconds."""
    from qwlit.config.compose import compose
    from qwlit.planning.preflight.rules import check_allowed

    composed = compose(overrides)
    check_allowed(composed.config.preflight.allow)
    return composed


def own_options(
    arguments: list[str], known: Mapping[str, Collection[str] | None]
) -> tuple[dict[str, str | None], list[str]]:
    """Separate the subcommand's own `key=value` options from the overrides of `train`.

    Args:
        known: the subcommand's keys and their choices. None allows any text; the first choice is the default.

    Returns:
        The value of every known key, and the overrides.

    Raises:
        ConfigError: an option is another trainer's, is typed twice, or begins with a dash, a value is not among the
            choices, or an unknown key resembles one of `known` and is not a setting.
    """
    from qwlit.config.compose import check_arguments

    check_arguments(arguments, known)
    own = {key: next(iter(choices)) if choices else None for key, choices in known.items()}
    overrides, typed = [], set()
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if (name := key.lstrip("-")) != key:
            if name in known:
                raise ConfigError(f"{argument}: write {name}={value or '…'}, without dashes")
            hint = nearest(argument, ["--help"])
            raise ConfigError(f"{argument}: no such option.{hint} Settings are key=value")
        if key not in known:
            if equals and (hint := nearest(key, known)) and not _is_setting(key):
                raise ConfigError(f"{argument}: there is no '{key}' here.{hint}")
            overrides.append(argument)
            continue
        if key in typed:
            raise ConfigError(f"{key} is typed twice, as {own[key]} and {value}; type it once")
        typed.add(key)
        choices = known[key]
        if choices is not None and value not in choices:
            raise ConfigError(f"{key}={value}: choose one of {', '.join(choices)}.{nearest(value, choices)}")
        own[key] = value
    return own, overrides


def _is_setting(key: str) -> bool:
    from dataclasses import fields

    from qwlit.config.groups import group_options
    from qwlit.config.run import RunConfig

    name = key.lstrip("+~").partition(".")[0]
    return name in {"config", "hydra", *group_options(), *(field.name for field in fields(RunConfig))}


def typed_root(overrides: list[str]) -> str:
    """Return the folder of the runs, `run.root`, as typed or by default."""
    return next((word.partition("=")[2] for word in overrides if word.startswith("run.root=")), "runs")


def typed_number(own: Mapping[str, str | None], key: str, least: int = 1) -> int | None:
    """Return the typed number of `key`, or None if it was not typed.

    Raises:
        ConfigError: the value is not a whole number of at least `least`.
    """
    text = own[key]
    if text is None:
        return None
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{key}={text}: give a whole number of at least {least}")
    return int(text)
