"""Keys and texts that say whether a model may imitate a row: obey them, or refuse the row and name the remedy."""

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
"""Keys of TRL, LLaMA-Factory, ms-swift and OpenAI, and keys with the same spelling pattern."""
_MEDIA = ("image", "video", "audio")
_ENDINGS = ("", "s", "_path", "_paths", "_url", "_urls", "_file", "_files")
MEDIA_KEYS = frozenset({"pixel_values", *(f"{medium}{ending}" for medium in _MEDIA for ending in _ENDINGS)})
MARK_KEYS = ("weight", "loss", "train", "loss_weight")
"""Keys of a row or a turn that say whether it is supervised."""
REFUSABLE_KEYS = frozenset(LABEL_KEYS) | PREFERENCE_KEYS | MEDIA_KEYS
"""Keys whose value can make qwlit refuse the row; see `refuse_unsupported_row`."""
# A number may follow the name, as in <image 1>; anything else between the brackets is HTML.
_PLACEHOLDER = re.compile(r"<(?:image|video|audio)(?:[ _-]?\d+)?>|<img>[^<]*</img>", re.IGNORECASE)
# HTML has no <image>, and its <img> has no end tag. <video> and <audio> may be HTML, unless they begin or end a text.
_IMAGE_PLACEHOLDER = re.compile(r"<image(?:[ _-]?\d+)?>|<img>[^<]*</img>", re.IGNORECASE)
_PLACEHOLDER_AT_AN_END = re.compile(rf"\A\s*(?:{_PLACEHOLDER.pattern})|(?:{_PLACEHOLDER.pattern})\s*\Z", re.IGNORECASE)
# All cells of a CSV file are texts.
_FLAGS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


def refuse_unsupported_row(row: Mapping[str, Any], *, has_answer: bool, where: str = "") -> None:
    """Raise RowError for an unwanted answer, a preference row, or a row with media; with `where`, for one turn.

    Args:
        has_answer: the row is a conversation. In a document or tokenized row, the label 0 is the number of a class.
    """
    if REFUSABLE_KEYS.isdisjoint(row):
        return
    for key in sorted(row.keys() & REFUSABLE_KEYS):
        value = row[key]
        # `chosen` is a label only as true or false: as a number it is an index into a list of answers.
        is_label = key in LABEL_KEYS or key == "chosen"
        if is_label and label_value(value, has_answer=has_answer and key != "chosen") is False:
            raise RowError(
                f"{where}'{key}' is false: the answer is marked as unwanted, and training would teach it;"
                f" remove such rows, or remove the key '{key}' if it means something else"
            )
        if key not in LABEL_KEYS and not _is_empty(value):
            raise RowError(where + (_media(key) if key in MEDIA_KEYS else _preference(key)))


def refuse_marked_row(row: Mapping[str, Any]) -> None:
    """Raise RowError if a mark says that the row is not to be trained on."""
    for key in MARK_KEYS:
        if as_flag(row.get(key)) is False:
            raise RowError(f"'{key}' is {row[key]}: the row is marked as not to be trained on; remove such rows")


def _media(key: str) -> str:
    return (
        f"has '{key}', but training reads only text, and the model would not see what the text is about;"
        f" remove such rows, or remove the key '{key}' if the text makes sense without it"
    )


def _preference(key: str) -> str:
    return (
        f"is a preference row ('{key}'): supervised fine-tuning reads one answer;"
        " keep the wanted answer as the last message (or 'completion', or 'output') and remove the other keys"
    )


def label_value(value: object, *, has_answer: bool) -> bool | None:
    """Return whether a label marks the answer as wanted or unwanted; None if the label means something else."""
    is_boolean = isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in ("true", "false"))
    return as_flag(value) if has_answer or is_boolean else None


def as_flag(value: object) -> bool | None:
    """Return whether a mark or label means true or false; None if it means neither, such as a weight of 0.7."""
    if isinstance(value, str):
        return _FLAGS.get(value.strip().lower())
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else None


def _is_empty(value: object) -> bool:
    """Return whether the value is empty; tables fill objects with nulls, and a CSV file writes false as text."""
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


def turn_mark(where: str, turn: Mapping[str, Any]) -> bool | None:
    """Return whether a turn is marked as supervised; None if it has no mark.

    Raises:
        RowError: a mark is neither true nor false, or two marks disagree.
    """
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
    """Raise RowError if a question or system text has an image placeholder, or begins or ends with one for video or
    audio: elsewhere <video> and <audio> may be HTML."""
    if "<" in text and (match := _IMAGE_PLACEHOLDER.search(text) or _PLACEHOLDER_AT_AN_END.search(text)):
        raise RowError(
            f"{where}: {match.group().strip()} is a placeholder for something that is not text;"
            " training reads only text: remove such rows, or remove the placeholder if the text makes sense without it"
        )


def holds_placeholder(text: str) -> bool:
    """Return whether the text has a placeholder anywhere."""
    return "<" in text and _PLACEHOLDER.search(text) is not None
