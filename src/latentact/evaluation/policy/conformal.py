"""Prediction intervals and sets that cover the true action with a given probability, by conformal prediction.

Scores of labeled steps that the predictor was not trained on give a threshold; a new step's interval or set
contains every action whose score is at most that threshold (Lei et al., arXiv 1604.04173; for classes Sadinle
et al., 1609.00451). Residuals are divided by those of similar steps, so that intervals are wide where the
predictor errs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from latentact.errors import UserError

NEIGHBORS = 16
"""Number of nearest labeled steps whose residuals give the scale of a step."""
FLOOR = 0.1
"""Fraction of the mean residual that is added to every scale."""


def conformal_quantile(scores: Float[np.ndarray, " n"], level: float) -> float:
    """Return the ceil((n + 1) * level)-th smallest of n scores.

    Raises:
        UserError: there are too few scores.
    """
    rank = int(np.ceil((len(scores) + 1) * level - 1e-9))
    if rank > len(scores):
        raise UserError(
            f"{len(scores)} labeled steps are too few for intervals of {level:.0%}; label more episodes."
        )
    return float(np.sort(scores)[rank - 1])


def temperature(probabilities: Float[np.ndarray, "n c"], labels: Int64[np.ndarray, " n"]) -> float:
    """Return the temperature-scaling exponent with the smallest cross-entropy (arXiv 1706.04599)."""
    grid = np.geomspace(0.05, 5, 61)
    logs = np.log(np.clip(probabilities, 1e-12, 1))
    losses = [-np.log(scaled(logs, power)[np.arange(len(labels)), labels]).mean() for power in grid]
    return float(grid[int(np.argmin(losses))])


def scaled(logs: Float[np.ndarray, "n c"], power: float) -> Float[np.ndarray, "n c"]:
    """Return the softmax of `power` times log-probabilities, clipped above 0."""
    raised = np.exp(power * (logs - logs.max(1, keepdims=True)))
    return np.clip(raised / raised.sum(1, keepdims=True), 1e-12, 1)


@runtime_checkable
class Calibration(Protocol):
    """What makes sets or intervals of predictions."""

    def columns(self, predicted: Float[Tensor, "n o"], inputs: Float[Tensor, "n f"]) -> dict[str, np.ndarray]:
        """Return columns of n steps: the action, its set or interval, and its uncertainty.

        Args:
            predicted: output of the predictor.
            inputs: its inputs.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class ClassCalibration:
    """Calibrated class probabilities and prediction sets."""

    power: float
    """Exponent of the probabilities."""
    threshold: float
    """A class is in the set if 1 - its probability is at most this."""

    @classmethod
    def fit(
        cls, probabilities: Float[np.ndarray, "n c"], labels: Int64[np.ndarray, " n"], level: float
    ) -> ClassCalibration:
        """Calibrate on steps that the predictor was not trained on."""
        power = temperature(probabilities, labels)
        right = scaled(np.log(np.clip(probabilities, 1e-12, 1)), power)[np.arange(len(labels)), labels]
        return cls(power=power, threshold=conformal_quantile(1 - right, level))

    def probabilities(self, probabilities: Float[np.ndarray, "n c"]) -> Float[np.ndarray, "n c"]:
        """Return calibrated probabilities."""
        return scaled(np.log(np.clip(probabilities, 1e-12, 1)), self.power)

    def sets(self, probabilities: Float[np.ndarray, "n c"]) -> Bool[np.ndarray, "n c"]:
        """Return the prediction set of each step, which is empty if no class is probable enough."""
        return 1 - self.probabilities(probabilities) <= self.threshold

    def columns(self, predicted: Float[Tensor, "n c"], inputs: Float[Tensor, "n f"]) -> dict[str, np.ndarray]:
        """Return `action`, `set` and `uncertainty` of each step; see `Calibration`."""
        raw = predicted.double().numpy()
        likely = self.probabilities(raw)
        return {"action": likely.argmax(1), "set": self.sets(raw), "uncertainty": 1 - likely.max(1)}


@dataclass(frozen=True, kw_only=True)
class IntervalCalibration:
    """Half-widths of intervals around predicted values."""

    inputs: Float[np.ndarray, "c f"]
    """Features of the labeled steps, for finding similar ones."""
    residuals: Float[np.ndarray, "c a"]
    """Absolute errors at the labeled steps."""
    factors: Float64[np.ndarray, " a"]
    """Threshold: half-width in units of the scale."""
    spread: Float[np.ndarray, " a"]
    """Standard deviation of the labeled actions: the unit of the uncertainty."""

    @classmethod
    def fit(
        cls,
        inputs: Float[np.ndarray, "c f"],
        residuals: Float[np.ndarray, "c a"],
        groups: Int64[np.ndarray, " c"],
        level: float,
        spread: Float[np.ndarray, " a"],
    ) -> IntervalCalibration:
        """Calibrate on steps that the predictor was not trained on; their scales come from other groups."""
        scale = np.empty_like(residuals)
        for group in np.unique(groups):
            others = groups != group
            if not others.any():
                others = ~others  # a single episode
            scale[groups == group] = _scale(inputs[others], residuals[others], inputs[groups == group])
        factors = [conformal_quantile(column, level) for column in (residuals / scale).T]
        return cls(inputs=inputs, residuals=residuals, factors=np.array(factors), spread=spread)

    def half_widths(self, inputs: Float[np.ndarray, "n f"]) -> Float[np.ndarray, "n a"]:
        """Return the half-width of the interval of each value."""
        return _scale(self.inputs, self.residuals, inputs) * self.factors

    def columns(self, predicted: Float[Tensor, "n a"], inputs: Float[Tensor, "n f"]) -> dict[str, np.ndarray]:
        """Return `action`, `low`, `high` and `uncertainty` of each step; see `Calibration`."""
        half, action = self.half_widths(inputs.numpy()), predicted.numpy()
        return {
            "action": action,
            "low": (action - half).astype(np.float32),
            "high": (action + half).astype(np.float32),
            "uncertainty": (half / self.spread).mean(1),
        }


def _scale(
    known: Float[np.ndarray, "c f"], residuals: Float[np.ndarray, "c a"], inputs: Float[np.ndarray, "n f"]
) -> Float[np.ndarray, "n a"]:
    """Return the mean residual of the nearest labeled steps plus a fraction of the overall mean."""
    reference, count = torch.from_numpy(known), min(NEIGHBORS, len(known))
    near = [
        torch.cdist(part, reference).topk(count, largest=False).indices
        for part in torch.from_numpy(inputs).split(4096)
    ]
    local = residuals[torch.cat(near).numpy()].mean(1)
    return local + np.maximum(FLOOR * residuals.mean(0), 1e-9)
