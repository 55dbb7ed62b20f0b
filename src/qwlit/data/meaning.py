"""Keys and texts that change what a row means: obeyed here, or the row is refused with the way out."""

import re
from collections.abc import Mapping
from typing import Any

from qwlit.data.rows import RowError

LABEL_KEYS = ("label", "kto_tag")
_ANSWERS = ("response", "responses", "message", "messages", "conversations", "answer", "completion", "output")
PREFERENCE_KEYS = frozenset(
    {"chosen", "rejected", "positive_messages", "negative_messages", "preferred_output", "non_preferred_output"}
    | {f"{which}_{answer}" for which in ("chosen", "rejected") for answer in _ANSWERS}
    | {f"{answer}_{which}" for which in ("chosen", "rejected") for answer in _ANSWERS}
)
"""Of TRL, LLaMA-Factory, ms-swift and OpenAI, and what follows their spelling."""
_MEDIA = ("image", "video", "audio")
_ENDINGS = ("", "s", "_path", "_paths", "_url", "_urls", "_file", "_files")
MEDIA_KEYS = frozenset({"pixel_values", *(f"{medium}{ending}" for medium in _MEDIA for ending in _ENDINGS)})
MARK_KEYS = ("weight", "loss", "train", "loss_weight")
_MARKS = frozenset(MARK_KEYS)
MEANING_KEYS = frozenset(LABEL_KEYS) | PREFERENCE_KEYS | MEDIA_KEYS
# A number may follow; anything else between the brackets is HTML.
_PLACEHOLDER = re.compile(r"<(?:image|video|audio)(?:[ _-]?\d+)?>|<img>[^<]*</img>", re.IGNORECASE)
# <image> is no HTML, and <img> has no end there; <video> and <audio> may be HTML but for where they stand.
_STANDS_FOR_A_PICTURE = re.compile(r"<image(?:[ _-]?\d+)?>|<img>[^<]*</img>", re.IGNORECASE)
_AT_AN_END = re.compile(rf"\A\s*(?:{_PLACEHOLDER.pattern})|(?:{_PLACEHOLDER.pattern})\s*\Z", re.IGNORECASE)
# A CSV holds texts alone.
_FLAGS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


def refuse_other_meaning(row: Mapping[str, Any], *, has_answer: bool, where: str = "") -> None:
    """Raise RowError where a key says that the row, or with `where` a turn of it, is no text to imitate.

    Args:
        has_answer: it is a conversation; in a document or tokens the number 0 as a label names a class.
    """
    if not where:
        _refuse_marked_row(row)
    if MEANING_KEYS.isdisjoint(row):
        return
    for key in sorted(row.keys() & MEANING_KEYS):
        value = row[key]
        # As a label `chosen` says so in words only: its numbers are places in a list.
        is_label = key in LABEL_KEYS or key == "chosen"
        if is_label and label_of(value, has_answer=has_answer and key != "chosen") is False:
            raise RowError(
                f"{where}'{key}' is false: the answer is marked as unwanted, and training would teach it;"
                f" leave such rows out, or the key '{key}' if it means something else"
            )
        if key not in LABEL_KEYS and not _is_empty(value):
            raise RowError(where + (_media(key) if key in MEDIA_KEYS else _preference(key)))


def marks_row(value: object) -> bool | None:
    """Return whether a mark says that the row is to be trained on; None where it says neither, as a weight of 0.7."""
    return _flag(value)


def _refuse_marked_row(row: Mapping[str, Any]) -> None:
    for key in MARK_KEYS:
        if marks_row(row.get(key)) is False:
            raise RowError(f"'{key}' is {row[key]}: the row is marked as not to be trained on; leave such rows out")


def _media(key: str) -> str:
    return (
        f"has '{key}', and training reads text alone: its text is about what the model would not see;"
        f" leave such rows out, or the key '{key}' if the text stands for itself"
    )


def _preference(key: str) -> str:
    return (
        f"is a preference row ('{key}'): supervised fine-tuning reads one answer;"
        " keep the wanted answer as the last message (or 'completion', or 'output') and leave the other keys out"
    )


def label_of(value: object, *, has_answer: bool) -> bool | None:
    """Return what a label says of the answer: wanted, unwanted, or None where it means something else."""
    says = isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in ("true", "false"))
    return _flag(value) if has_answer or says else None


def _flag(value: object) -> bool | None:
    if isinstance(value, str):
        return _FLAGS.get(value.strip().lower())
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else None


def _is_empty(value: object) -> bool:
    """Whether there is nothing in it; tables fill objects up with nulls, and a CSV spells false as text."""
    if isinstance(value, dict):
        return all(map(_is_empty, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_empty, value))
    return (
        value is None
        or value is False
        or value == b""
        or (isinstance(value, str) and value.strip().lower() in ("", "[]", "false"))
    )


def mark_of(where: str, turn: Mapping[str, Any]) -> bool | None:
    """Return whether a turn is marked as supervised; None where it has no mark.

    Raises:
        RowError: a mark is neither, or two of them disagree.
    """
    if _MARKS.isdisjoint(turn):
        return None
    marks = {key: _mark(where, key, turn[key]) for key in MARK_KEYS if turn.get(key) is not None}
    if len(set(marks.values())) > 1:
        raise RowError(f"{where}: {' and '.join(map(repr, marks))} disagree on whether it is supervised; keep one")
    return next(iter(marks.values()), None)


def _mark(where: str, key: str, value: object) -> bool:
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    raise RowError(
        f"{where}: '{key}' must be 0 or false (read, not supervised) or 1 or true (supervised), not {repr(value)[:30]}"
    )


def refuse_placeholder(where: str, text: str) -> None:
    """Raise RowError where what a user or the system says has a placeholder for a picture, or opens or ends with one
    for sound or video: elsewhere those may be HTML."""
    if "<" in text and (found := _STANDS_FOR_A_PICTURE.search(text) or _AT_AN_END.search(text)):
        raise RowError(
            f"{where}: {found.group().strip()} stands for what is not text, and training reads text alone;"
            " leave such rows out, or the placeholder if the text stands for itself"
        )


def holds_placeholder(text: str) -> bool:
    """Whether a placeholder stands anywhere in the text."""
    return "<" in text and _PLACEHOLDER.search(text) is not None
