"""Confidence intervals of means over samples, without an assumption about their distribution."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2_000
"""Draws of a bootstrap and of a permutation test: enough for two digits of a 95 % interval (Efron and Tibshirani, An
Introduction to the Bootstrap, 1993, section 13.3)."""


def bootstrap_interval(sums: NDArray[Any], weights: NDArray[Any]) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap of the sum of `sums` over that of `weights`, the same at every call.

    Args:
        sums, weights: (S,) each, one entry for each sample that is drawn as a whole.
    """
    generator, count = np.random.default_rng(0), len(sums)
    draws = np.empty(RESAMPLES)
    for draw in range(RESAMPLES):
        ids = generator.integers(0, count, count)
        draws[draw] = sums[ids].sum() / weights[ids].sum()
    low, high = np.percentile(draws, (2.5, 97.5))
    return float(low), float(high)
