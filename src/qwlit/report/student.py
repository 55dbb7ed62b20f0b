"""Student's t distribution, confidence intervals, and Welch's test. scipy is no dependency of qwlit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

CONFIDENCE, POWER = 0.95, 0.8
MOST_SAMPLES = 10_000


def two_sided(t: float, freedom: float) -> float:
    """Return the probability that |T| is at least |t|, for T with so many degrees of freedom.

    It is I_x(freedom/2, 1/2) with x = freedom / (freedom + t²): Abramowitz and Stegun, 26.7.1 and 26.5.27.
    """
    return _incomplete_beta(freedom / (freedom + t * t), freedom / 2, 0.5)


def critical(probability: float, freedom: float) -> float:
    """Return t with `two_sided(t, freedom)` = probability, by bisection."""
    low, high = 0.0, 1.0
    while two_sided(high, freedom) > probability:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, freedom) > probability else (low, middle)
    return high


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """Return the regularized incomplete beta function I_x(a, b) as a continued fraction: Abramowitz and Stegun, 26.5.8.

    The fraction is evaluated by Lentz's method (Thompson and Barnett 1986), where it converges fast.
    """
    if x in (0, 1):
        return x
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    tiny = 1e-300
    value = c = 1.0
    d = 0.0
    for index in range(1000):
        m = index // 2
        if index == 0:
            term = 1.0
        elif index % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1 / (1 + term * d or tiny)
        c = 1 + term / c or tiny
        value *= c * d
        if abs(1 - c * d) < 1e-15:
            break
    return front * (value - 1)


@dataclass(frozen=True)
class Estimate:
    """What several runs say about a metric."""

    count: int
    mean: float
    deviation: float
    """With count - 1 in the denominator."""
    half_width: float
    """Of the confidence interval of the mean."""


def estimate(values: Sequence[float]) -> Estimate:
    """Return mean, deviation and the 95 % confidence interval of two or more values."""
    deviation = stdev(values)
    half = critical(1 - CONFIDENCE, len(values) - 1) * deviation / math.sqrt(len(values))
    return Estimate(len(values), mean(values), deviation, half)


def welch(a: Estimate, b: Estimate) -> float:
    """Return the two-sided p-value that the means are the same although the deviations may differ (Welch 1947)."""
    parts = [e.deviation**2 / e.count for e in (a, b)]
    if sum(parts) == 0:
        return float(a.mean == b.mean)
    freedom = sum(parts) ** 2 / sum(part**2 / (e.count - 1) for part, e in zip(parts, (a, b), strict=True))
    return two_sided((a.mean - b.mean) / math.sqrt(sum(parts)), freedom)


def samples_needed(a: Estimate, b: Estimate) -> int | None:
    """Return how many runs of each it takes to see a difference as large as that of the means, four times in five.

    The smallest n with |difference| >= (t(0.05) + t(0.4)) * sqrt((s² + s'²) / n), t two-sided with 2n - 2 degrees of
    freedom: Snedecor and Cochran, Statistical Methods, 6.14, with t for the normal deviates. None: more than 10,000.
    """
    difference, variance = abs(a.mean - b.mean), a.deviation**2 + b.deviation**2
    for count in range(2, MOST_SAMPLES):
        freedom = 2 * count - 2
        # From here on the normal deviates give the same number.
        reach = 2.8016 if count > 200 else critical(1 - CONFIDENCE, freedom) + critical(2 * (1 - POWER), freedom)
        if difference >= reach * math.sqrt(variance / count):
            return count
    return None
