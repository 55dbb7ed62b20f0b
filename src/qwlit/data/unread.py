"""Keys of rows and messages that nobody reads: named in remarks, and however many there are, only so many names."""

from collections import Counter
from collections.abc import Iterable, Iterator

MAX_NAMED = 20
LONGEST_NAME = 30
OTHER_KEYS = "further keys that are not read"
"""The remark on names after the first MAX_NAMED."""
_NAMED = ("a row key that is not read: ", "a message key that is not read: ")


def has_value(value: object) -> bool:
    """Whether a key holds anything; a CSV spells null as an empty cell."""
    return value is not None and value != ""


def row_key_remarks(keys: Iterable[object]) -> Iterator[str]:
    """Yield a remark for each key of a row that is not read, and one for all after MAX_NAMED."""
    return _remarks(_NAMED[0], keys)


def message_key_remarks(keys: Iterable[object]) -> Iterator[str]:
    """Yield a remark for each key of a row's messages that is not read, and one for all after MAX_NAMED."""
    return _remarks(_NAMED[1], keys)


def _remarks(named: str, keys: Iterable[object]) -> Iterator[str]:
    names = sorted({str(key)[:LONGEST_NAME] for key in keys})
    yield from (f"{named}{name!r}" for name in names[:MAX_NAMED])
    if len(names) > MAX_NAMED:
        yield OTHER_KEYS


def add_remarks(total: Counter[str], more: Counter[str]) -> None:
    """Add remarks up, naming only the first MAX_NAMED unread keys: rows may have any number of them."""
    num_named = sum(text.startswith(_NAMED) for text in total)
    for text, number in more.items():
        if text not in total and text.startswith(_NAMED):
            num_named += 1
        total[text if text in total or num_named <= MAX_NAMED or not text.startswith(_NAMED) else OTHER_KEYS] += number
