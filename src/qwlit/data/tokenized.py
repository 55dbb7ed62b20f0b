"""Encoded samples, and rows that are tokenized already."""

from dataclasses import dataclass
from typing import Any

from qwlit.data.config import LossOn
from qwlit.data.conversation import from_json_text
from qwlit.data.rows import RowError

IGNORED_LABEL = -100


@dataclass(frozen=True)
class EncodedSample:
    """A sample as tokens: two lists of T numbers."""

    input_ids: list[int]
    loss_mask: list[int]
    """1 if the token is supervised. The first token is always 0: no token precedes it to predict it."""

    def slice(self, start: int, end: int) -> "EncodedSample":
        """Return the tokens from `start` to before `end` as a new sample."""
        return EncodedSample(self.input_ids[start:end], [0, *self.loss_mask[start + 1 : end]])

    def split(self, limit: int) -> "list[EncodedSample]":
        """Split into samples of at most `limit` tokens.

        Each begins with the last token of the one before. That token is only context, so each token except the very
        first one is a target exactly once.
        """
        starts = range(0, max(1, len(self.input_ids) - 1), limit - 1)
        return [self.slice(start, start + limit) for start in starts]


def parse_tokenized(row: dict[str, Any], vocab_size: int, loss_on: LossOn) -> EncodedSample:
    """Parse `input_ids` with `labels` or `loss_mask`. Without both, supervise every token if `loss_on` is "all"."""
    ids = from_json_text(row["input_ids"], "'input_ids'")
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise RowError("'input_ids' must be a list of whole numbers")
    if len(ids) < 2:
        raise RowError(f"'input_ids' has {len(ids)} tokens; the first is never supervised, so it needs at least 2")
    if min(ids) < 0 or max(ids) >= vocab_size:
        wrong = next(token for token in ids if not 0 <= token < vocab_size)
        raise RowError(f"token id {str(wrong)[:30]} is not within the vocabulary of {vocab_size}")
    labels, mask = (from_json_text(row.get(key), f"'{key}'") for key in ("labels", "loss_mask"))
    if labels is not None and mask is not None:
        raise RowError("has both 'labels' and 'loss_mask'; keep one")
    if labels is not None:
        mask = _mask_of_labels(ids, labels)
    elif mask is None:
        if "labels" in row or "loss_mask" in row or loss_on != "all":
            raise RowError(
                "'input_ids' without 'labels' or 'loss_mask'; add one, or set data.loss_on=all to supervise every token"
            )
        mask = [1] * len(ids)
    if not isinstance(mask, list) or len(mask) != len(ids):
        raise RowError(f"'loss_mask' must be a list as long as 'input_ids' ({len(ids)})")
    if not all(type(flag) is int and flag in (0, 1) for flag in mask):
        raise RowError("'loss_mask' may have only 0 and 1")
    return EncodedSample(ids, [0, *mask[1:]])


def _mask_of_labels(ids: list[int], labels: object) -> list[int]:
    if not isinstance(labels, list) or len(labels) != len(ids):
        raise RowError(f"'labels' must be a list as long as 'input_ids' ({len(ids)})")
    for position, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if type(label) is not int or label not in (IGNORED_LABEL, token):
            raise RowError(f"label {str(label)[:30]} at position {position} is neither the token {token} nor -100")
    return [int(label != IGNORED_LABEL) for label in labels]
