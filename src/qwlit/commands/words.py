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
        ConfigError: a value is none of the choices.
    """
    own = {key: next(iter(choices)) if choices else None for key, choices in known.items()}
    overrides = []
    for word in arguments:
        key, _, value = word.partition("=")
        if key not in known:
            overrides.append(word)
            continue
        choices = known[key]
        if choices is not None and value not in choices:
            raise ConfigError(f"{key}={value}: choose one of {', '.join(choices)}.{nearest(value, choices)}")
        own[key] = value
    return own, overrides


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
