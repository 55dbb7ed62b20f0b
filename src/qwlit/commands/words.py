"""Words of a verb that are no settings of a run."""

from collections.abc import Collection, Mapping

from qwlit.core.errors import ConfigError, nearest


def own_words(
    arguments: list[str], known: Mapping[str, Collection[str] | None]
) -> tuple[dict[str, str | None], list[str]]:
    """Take the verb's own `key=value` words out; everything else is an override of `train`.

    Args:
        known: its keys with their choices, None where any text will do; the first choice stands where none is typed.

    Raises:
        ConfigError: a value is none of the choices, or a word is nearly one of `known` and no setting either.
    """
    own = {key: next(iter(choices)) if choices else None for key, choices in known.items()}
    overrides = []
    for word in arguments:
        key, equals, value = word.partition("=")
        if key not in known:
            if equals and (hint := nearest(key, known)) and not _is_setting(key):
                raise ConfigError(f"{word}: there is no '{key}' here.{hint}")
            overrides.append(word)
            continue
        choices = known[key]
        if choices is not None and value not in choices:
            raise ConfigError(f"{key}={value}: choose one of {', '.join(choices)}.{nearest(value, choices)}")
        own[key] = value
    return own, overrides


def _is_setting(key: str) -> bool:
    from dataclasses import fields

    from qwlit.config.compose import group_options
    from qwlit.config.run import RunConfig

    name = key.lstrip("+~").partition(".")[0]
    return name in {"config", "hydra", *group_options(), *(field.name for field in fields(RunConfig))}


def whole_number(own: Mapping[str, str | None], key: str, least: int = 1) -> int | None:
    """Return the number that `key` was given, None where it was not typed.

    Raises:
        ConfigError: it is no whole number from `least` up.
    """
    text = own[key]
    if text is None:
        return None
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{key}={text}: give a whole number from {least} up")
    return int(text)
