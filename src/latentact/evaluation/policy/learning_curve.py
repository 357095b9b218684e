"""Success by the number of labeled episodes: a prediction from measured rollouts, with an interval.

The log-odds of success are a line in the logarithm of the number of episodes, plus the spread between runs.
The line is fit by Bayesian linear regression. Without rollouts the prior remains, whose intervals are wide:
latent actions alone do not say how hard a task is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

PRIOR_MEAN = (0.0, 0.8)
"""Log-odds at `REFERENCE` episodes, and their slope."""
PRIOR_STD = (1.5, 0.4)
REFERENCE = 5
SPREAD = 0.5
"""Standard deviation of the log-odds between runs with as many episodes."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Success of one grounded policy."""

    k: float | int
    """Labeled episodes, or the number of random ones that they are worth."""
    successes: float | int
    episodes: int


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """Predicted success of one grounded policy."""

    success: float
    low: float
    high: float
    """95 % interval."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LearningCurve:
    """A line of log-odds of success with its uncertainty."""

    mean: Float64[np.ndarray, " 2"]
    covariance: Float64[np.ndarray, "2 2"]

    @classmethod
    def fit(cls, measured: Sequence[Measured]) -> LearningCurve:
        """Fit the line to rollouts; to none: the prior."""
        precision = np.diag(1 / np.square(PRIOR_STD))
        total = precision @ np.array(PRIOR_MEAN)
        for each in measured:
            won, lost = each.successes + 0.5, each.episodes - each.successes + 0.5
            weight = 1 / (SPREAD**2 + 1 / won + 1 / lost)
            x = _inputs(each.k)
            precision = precision + weight * np.outer(x, x)
            total = total + weight * x * np.log(won / lost)
        covariance = np.linalg.inv(precision)
        return cls(mean=covariance @ total, covariance=covariance)

    def predict(self, k: float | int) -> Predicted:
        """Return the success of a policy with k labeled episodes."""
        x = _inputs(k)
        center, half = x @ self.mean, 1.96 * np.sqrt(x @ self.covariance @ x + SPREAD**2)
        success, low, high = (
            float(1 / (1 + np.exp(-each))) for each in (center, center - half, center + half)
        )
        return Predicted(success=success, low=low, high=high)


def _inputs(k: float | int) -> Float64[np.ndarray, " 2"]:
    return np.array([1.0, np.log(max(k, 0.5) / REFERENCE)])
