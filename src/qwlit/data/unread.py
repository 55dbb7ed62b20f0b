"""Remarks on keys of rows and messages that qwlit does not read; at most MAX_NAMED keys by name."""

from collections import Counter
from collections.abc import Iterable, Iterator

MAX_NAMED = 20
LONGEST_NAME = 30
OTHER_KEYS = "further keys that are not read"
"""The remark on names after the first MAX_NAMED."""
_PREFIXES = ("a row key that is not read: ", "a message key that is not read: ")


def has_value(value: object) -> bool:
    """Return whether a key has a value; in a CSV file an empty cell means null."""
    return value is not None and value != ""


def row_key_remarks(keys: Iterable[object]) -> Iterator[str]:
    """Yield a remark for each unread key of a row, and one remark for all keys after MAX_NAMED."""
    return _remarks(_PREFIXES[0], keys)


def message_key_remarks(keys: Iterable[object]) -> Iterator[str]:
    """Yield a remark for each unread key of a row's messages, and one remark for all keys after MAX_NAMED."""
    return _remarks(_PREFIXES[1], keys)


def _remarks(prefix: str, keys: Iterable[object]) -> Iterator[str]:
    names = sorted({str(key)[:LONGEST_NAME] for key in keys})
    yield from (f"{prefix}{name!r}" for name in names[:MAX_NAMED])
    if len(names) > MAX_NAMED:
        yield OTHER_KEYS


def add_remarks(total: Counter[str], more: Counter[str]) -> None:
    """Add `more` to `total`, but name only the first MAX_NAMED unread keys: a data set can have any number of them."""
    num_named = sum(text.startswith(_PREFIXES) for text in total)
    for text, number in more.items():
        if text not in total and text.startswith(_PREFIXES):
            num_named += 1
        total[text if text in total or num_named <= MAX_NAMED or not text.startswith(_PREFIXES) else OTHER_KEYS] += (
            number
        )
