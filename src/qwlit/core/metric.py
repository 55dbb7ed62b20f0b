"""The metric that a sweep optimizes, and that orders the runs of a report."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from qwlit.core.schema import config_dataclass


def set_loss_key(name: str) -> str:
    """Return the key in metrics.jsonl of the loss of the validation set with this name."""
    return f"val/{name}/loss"


def set_of_key(key: str) -> str | None:
    """Return the name of the validation set whose loss has this key; None for any other key."""
    match = re.fullmatch(r"val/(.+)/loss", key)
    return match[1] if match else None


LARGEST = 1e100
"""No run measures more, and arithmetic and drawing with larger numbers overflow."""


@config_dataclass
class Metric:
    """A key of metrics.jsonl or of summary.json, and which of its values are better."""

    name: str
    goal: Literal["minimize", "maximize"] = "minimize"

    def best(self, values: Iterable[float]) -> float | None:
        """Return the best finite value, or None if there is none."""
        finite = (value for value in values if math.isfinite(value))
        return (min if self.goal == "minimize" else max)(finite, default=None)

    def best_of_run(self, values: Iterable[float], summary: Mapping[str, Any]) -> float | None:
        """Return the best of `values`, which are from metrics.jsonl; if there is none, the value in summary.json."""
        best = self.best(values)
        return number_or_none(summary.get(self.name)) if best is None else best


def number_or_none(value: Any) -> float | None:
    """Return a finite number as float, and None for anything else: null stands for NaN, and files may be broken."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        return None
    return float(value)
