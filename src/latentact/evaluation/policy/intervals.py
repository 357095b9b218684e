"""95 % confidence intervals: Wilson's for a success rate, a percentile bootstrap for a mean."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000


def success_interval(successes: Sequence[bool | int] | np.ndarray) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a success rate (Wilson, 1927)."""
    n, rate, z = len(successes), float(np.mean(successes)), 1.959963984540054
    center = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # At the ends the formula gives 0 and 1 up to rounding.
    return (max(0.0, center - half) if rate > 0 else 0.0), (min(1.0, center + half) if rate < 1 else 1.0)


def mean_interval(values: Sequence[float | int] | np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of a mean; the same seed gives the same interval."""
    array = np.asarray(values, np.float64)
    draws = np.random.default_rng(seed).integers(len(array), size=(RESAMPLES, len(array)))
    low, high = np.quantile(array[draws].mean(1), [0.025, 0.975])
    return float(low), float(high)
