"""Keys of rows and messages that qwlit does not read, and the remarks on them; at most MAX_NAMED keys by name."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import Any, Literal

MAX_NAMED = 20
LONGEST_NAME = 30
OTHER_KEYS = "further keys that are not read"
"""The remark on names after the first MAX_NAMED."""
_PREFIXES = {"row": "a row key that is not read: ", "message": "a message key that is not read: "}


def has_value(value: object) -> bool:
    """Return whether a key has a value; in a CSV file an empty cell means null."""
    return value is not None and value != ""


def unread_keys(value: dict[str, Any], read: Collection[str]) -> list[str]:
    """Return the keys that have a value and are not in `read`."""
    return [str(key) for key, cell in value.items() if key not in read and has_value(cell)]


def unread_key_remarks(owner: Literal["row", "message"], keys: Iterable[str]) -> Iterator[str]:
    """Yield a remark for each unread key of a row, or of its messages, and one remark for all keys after MAX_NAMED."""
    names = sorted({key[:LONGEST_NAME] for key in keys})
    yield from (f"{_PREFIXES[owner]}{name!r}" for name in names[:MAX_NAMED])
    if len(names) > MAX_NAMED:
        yield OTHER_KEYS


def add_remarks(total: Counter[str], more: Counter[str]) -> None:
    """Add `more` to `total`, but name only the first MAX_NAMED unread keys: a data set can have any number of them."""
    prefixes = tuple(_PREFIXES.values())
    num_named = sum(text.startswith(prefixes) for text in total)
    for text, count in more.items():
        is_new_key = text not in total and text.startswith(prefixes)
        num_named += is_new_key
        total[OTHER_KEYS if is_new_key and num_named > MAX_NAMED else text] += count
