"""Which steps two rules skip, on the same synthetic gradient norms: qwlit's, and the one that OLMo-core describes.

    python -m benchmarks.guard_rules [steps=10000]

OLMo-core's rule, written from its description: skip a step whose loss or gradient norm is more than 6 standard
deviations above the mean of the last 128 steps, once there are 64. Every step enters the window.
"""

import math
import sys
from collections import deque
from collections.abc import Callable
from statistics import fmean, stdev

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.machine import keep
from qwlit.training.resilience.spikes import SpikeDetector

BEGIN, EVERY = 200, 97
Series = NDArray[np.float64]
Rule = Callable[[float], bool]


def families(steps: int) -> dict[str, Series]:
    """Return series of log norms: normal noise, heavy tails, a falling level with waves, correlated noise."""
    dice, step = np.random.default_rng(0), np.arange(steps)
    correlated = np.zeros(steps)
    for index, noise in enumerate(0.1 * dice.standard_normal(steps - 1), start=1):
        correlated[index] = 0.95 * correlated[index - 1] + noise
    return {
        "normal, scale 0.3": 0.3 * dice.standard_normal(steps),
        "Student's t, 3 degrees, scale 0.2": 0.2 * dice.standard_t(3, steps),
        "falling level": 0.2 * dice.standard_normal(steps) + 1.5 * np.exp(-step / 500) + 0.3 * np.sin(step / 300),
        "correlated, 0.95": correlated,
    }


def ours() -> Rule:
    detector = SpikeDetector()

    def skips(norm: float) -> bool:
        spike = bool(detector.judge(torch.tensor(norm), torch.tensor(2.0)))
        return spike or not math.isfinite(norm)

    return skips


def olmo_core() -> Rule:
    window: deque[float] = deque(maxlen=128)

    def skips(norm: float) -> bool:
        known = list(window)
        window.append(norm)
        # A comparison with NaN is false, so a NaN in the window skips every step.
        return len(known) >= 64 and not norm - fmean(known) <= 6 * _deviation(known)

    return skips


def _deviation(values: list[float]) -> float:
    return stdev(values) if all(map(math.isfinite, values)) else math.nan


def skipped(rule: Rule, norms: Series) -> list[int]:
    return [step for step, norm in enumerate(norms.tolist()) if rule(norm)]


def measure(rule: Callable[[], Rule], log_norms: Series) -> dict[str, float]:
    """Return false skips of a healthy series, the share of spikes found, and what one NaN and a burst cost."""
    norms = np.exp(log_norms)
    bad = range(BEGIN, len(norms), EVERY)
    found: dict[str, float] = {"false skips": len(skipped(rule(), norms))}
    for factor in (30, 100):
        spiked = norms.copy()
        spiked[bad] *= factor
        found[f"recall x{factor}"] = len(set(skipped(rule(), spiked)) & set(bad)) / len(bad)
    with_nan = norms[: BEGIN + 400].copy()
    with_nan[BEGIN] = math.nan
    plain = set(skipped(rule(), norms[: BEGIN + 400]))
    found["steps lost to one NaN"] = len(set(skipped(rule(), with_nan)) - plain)
    burst = norms[: BEGIN + 400].copy()
    burst[BEGIN : BEGIN + 20] *= 100
    found["of a burst of 20 at x100"] = len(set(skipped(rule(), burst)) & set(range(BEGIN, BEGIN + 20)))
    return found


def main(arguments: list[str]) -> None:
    options = dict(word.split("=", 1) for word in arguments)
    rules = {"qwlit": ours, "OLMo-core's": olmo_core}
    series = families(int(options.get("steps", 10_000)))
    result = {
        name: {rule: measure(build, log_norms) for rule, build in rules.items()} for name, log_norms in series.items()
    }
    keep("guard_rules", result)


if __name__ == "__main__":
    main(sys.argv[1:])
