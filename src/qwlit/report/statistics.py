"""Robust statistics of logged series: medians and quantiles."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qwlit.report.runs import Series

NOISE_QUANTILES = {0.5: 0.674, 0.9: 1.645}
"""The noise is taken from the differences that so large a share do not exceed: so many deviations if it is normal. Of
the two the larger: as the guard says, the median is near 0 where most records are easy samples and the others hard."""


def noise_of(values: Sequence[float]) -> float:
    """Return the scale of the values around the lines through their neighbours: a second difference has √6 times it."""
    if len(values) < 3:
        return 0.0
    differences = np.abs(np.diff(values, 2)) / math.sqrt(6)
    return max(float(np.quantile(differences, share)) / scale for share, scale in NOISE_QUANTILES.items())


def smoothed(values: Sequence[float], most: int) -> tuple["np.ndarray[Any, Any]", float]:
    """Return the running median of `most` values, or of an eighth of a short series, and the scale of its noise."""
    half = max(3, min(most, len(values) // 8)) // 2
    medians = np.array([np.median(values[max(0, n - half) : n + half + 1]) for n in range(len(values))])
    # A median's deviation is 1.25 times that of a mean.
    return medians, 1.25 * noise_of(values) / math.sqrt(2 * half + 1)


def swings(
    steps: Sequence[int], values: "np.ndarray[Any, Any]", margin: Callable[[float], float]
) -> list[tuple[int, float, float]]:
    """Return step, lowest and highest value of each rise by the margin after which the values fell by it again."""
    found: list[tuple[int, float, float]] = []
    low, high, step = math.inf, -math.inf, 0
    for at, value in zip(steps, map(float, values), strict=True):
        if high > low + margin(low):
            high, step = max((high, step), (value, at))
            if value < high - margin(low):
                found.append((step, low, high))
                low, high = value, -math.inf
        else:
            low, high, step = min(low, value), value, at
    return found


def jumps(series: Series, width: int) -> tuple[float, int]:
    """Return the 95 % quantile of the distance to the median of `width` values, and the step of the largest one."""
    values = np.array([value for _, value in series])
    width = min(width, len(values) // 2) | 1
    windows = np.lib.stride_tricks.sliding_window_view(values, width)
    distances = np.abs(windows[:, width // 2] - np.median(windows, axis=1))
    return float(np.quantile(distances, 0.95)), series[int(np.argmax(distances)) + width // 2][0]
