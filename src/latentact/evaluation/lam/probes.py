"""Probes: how well an action can be predicted from a feature vector, on held-out episodes.

A probe is fitted on one set of episodes and scored on another (LAPO's `train_decoder` and LAOM's linear
probe, but held out). Discrete actions are scored by accuracy, continuous ones by R2 over dimensions that are
standardized on the fitting set. The interval comes from a bootstrap over episodes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from jaxtyping import Float, Int64, Shaped

RIDGE = 1.0  # weight of the L2 penalty on standardized features, as in scikit-learn's Ridge
LOGISTIC_PENALTY = 1e-3  # the same for the mean cross-entropy
MLP_HIDDEN = 128  # LAPO's decoder: two hidden layers of 128
MLP_STEPS = 500
MLP_BATCH = 256
BOOTSTRAPS = 1000


@dataclass(frozen=True, kw_only=True)
class ProbeScore:
    """Score of one probe on the scored episodes."""

    score: float
    """Accuracy (0..1) or R2 (1 is perfect, 0 is the mean, below 0 is worse than the mean)."""
    metric: Literal["accuracy", "r2"]
    """Name of the metric: accuracy or r2."""
    ci95: tuple[float, float]
    """95 % interval of a bootstrap over the scored episodes."""

    def to_json(self) -> dict[str, object]:
        """Return the entry of `lam.json`; R2 also as normalized squared error, 1 - R2."""
        nmse = {"nmse": 1 - self.score, "nmse_ci95": [1 - self.ci95[1], 1 - self.ci95[0]]}
        values: dict[str, object] = {"score": self.score, "metric": self.metric, "ci95": list(self.ci95)}
        return values | (nmse if self.metric == "r2" else {})


@dataclass(frozen=True, kw_only=True)
class ProbeData:
    """Features and targets of one set of transitions."""

    features: Float[np.ndarray, "n f"]
    """Inputs of the probe, `[n, f]`."""
    targets: Shaped[np.ndarray, "n *a"]
    """int64 classes `[n]` or floats `[n, a]`."""
    episode: Int64[np.ndarray, "n"]
    """Episode of each transition: the unit of the bootstrap."""

    @property
    def discrete(self) -> bool:
        """Whether the targets are classes."""
        return self.targets.ndim == 1


def linear_probe(fit: ProbeData, score: ProbeData, *, seed: int = 0) -> ProbeScore:
    """Fit ridge regression or multinomial logistic regression on `fit` and score it on `score`."""
    learn = _logistic if fit.discrete else _ridge
    return _run(fit, score, learn, seed)


def mlp_probe(fit: ProbeData, score: ProbeData, *, seed: int = 0) -> ProbeScore:
    """Fit an MLP with two hidden layers of 128 on `fit` and score it on `score`; deterministic by seed."""
    return _run(fit, score, lambda x, y, x_new: _mlp(x, y, x_new, seed=seed), seed)


def principal_components(
    fit: Float[np.ndarray, "n f"], features: Float[np.ndarray, "m f"], dims: int
) -> Float[np.ndarray, "m d"]:
    """Project `features` on the first `dims` principal components of `fit` (fewer when there are fewer)."""
    mean = fit.mean(0)
    _, _, axes = np.linalg.svd(fit - mean, full_matrices=False)
    return (features - mean) @ axes[:dims].T


Learner = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Fitting features, fitting targets, new features -> predicted targets (classes or floats)."""


def _run(fit: ProbeData, score: ProbeData, learn: Learner, seed: int) -> ProbeScore:
    x, x_new = _standardise(fit.features, score.features)
    if fit.discrete:
        right = learn(x, fit.targets, x_new) == score.targets
        statistics = np.stack([right, np.ones(len(right))], axis=1)
        return _scored(statistics, score.episode, _accuracy, "accuracy", seed)
    y, y_new = _standardise(fit.targets, score.targets)
    error = (learn(x, y, x_new) - y_new) ** 2
    ones = np.ones((len(y_new), 1))
    statistics = np.concatenate(
        [ones, error.sum(1, keepdims=True), (y_new**2).sum(1, keepdims=True), y_new], axis=1
    )
    return _scored(statistics, score.episode, _r2, "r2", seed)


def _scored(
    statistics: Float[np.ndarray, "n q"],
    episode: Int64[np.ndarray, "n"],
    value: Callable[[np.ndarray], np.ndarray],
    metric: Literal["accuracy", "r2"],
    seed: int,
) -> ProbeScore:
    """Compute score and interval from sums of `statistics` per episode, with one matrix product."""
    _, group = np.unique(episode, return_inverse=True)
    sums = np.zeros((group.max() + 1, statistics.shape[1]))
    np.add.at(sums, group, statistics)
    groups = len(sums)
    weights = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=BOOTSTRAPS)
    low, high = np.quantile(value(weights @ sums), [0.025, 0.975])
    return ProbeScore(
        score=float(value(sums.sum(0, keepdims=True))[0]), metric=metric, ci95=(float(low), float(high))
    )


def _accuracy(sums: Float[np.ndarray, "r 2"]) -> Float[np.ndarray, "r"]:
    return sums[:, 0] / sums[:, 1]


def _r2(sums: Float[np.ndarray, "r q"]) -> Float[np.ndarray, "r"]:
    """Return R2 from count, squared error, sum of squares and sum of each target; 0 without variance."""
    count, error, squares, totals = sums[:, 0], sums[:, 1], sums[:, 2], sums[:, 3:]
    spread = squares - (totals**2).sum(1) / count
    return np.where(spread > 1e-9 * count, 1 - error / np.maximum(spread, 1e-12), 0.0)


def _standardise(fit: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Standardize columns by the statistics of `fit`, and `other` likewise; constant columns become 0."""
    fit, other = fit.astype(np.float64), other.astype(np.float64)
    mean, deviation = fit.mean(0), fit.std(0)
    scale = np.where(deviation > 1e-6 * (1 + np.abs(mean)), 1 / np.maximum(deviation, 1e-12), 0.0)
    return (fit - mean) * scale, (other - mean) * scale


def _ridge(x: np.ndarray, y: np.ndarray, x_new: np.ndarray) -> np.ndarray:
    """Ridge regression in closed form, by the smaller Gram matrix; `x` and `y` have mean 0 (no bias)."""
    if len(x) < x.shape[1]:
        return x_new @ (x.T @ np.linalg.solve(x @ x.T + RIDGE * np.eye(len(x)), y))
    return x_new @ np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ y)


@contextmanager
def _small_training() -> Generator[None]:
    """Enable gradients in full precision on one thread; the networks are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_num_threads(threads)


def _logistic(x: np.ndarray, y: np.ndarray, x_new: np.ndarray) -> np.ndarray:
    """Multinomial logistic regression in double precision; one row of weights per class that occurs."""
    classes, target = np.unique(y, return_inverse=True)
    inputs, labels = torch.from_numpy(x), torch.from_numpy(target)
    weight = torch.zeros(x.shape[1], len(classes), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(classes), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(inputs @ weight + bias, labels) + LOGISTIC_PENALTY * weight.square().sum()
        loss.backward()
        return loss

    with _small_training():
        optimizer.step(closure)
    logits = x_new @ weight.detach().numpy() + bias.detach().numpy()
    return classes[logits.argmax(1)]


def _mlp(x: np.ndarray, y: np.ndarray, x_new: np.ndarray, *, seed: int) -> np.ndarray:
    """Train an MLP with AdamW for a fixed number of steps, with a learning rate that decays to zero."""
    discrete = y.ndim == 1
    classes, target = np.unique(y, return_inverse=True) if discrete else (np.empty(0), y)
    inputs = torch.from_numpy(x).float()
    labels = torch.from_numpy(target) if discrete else torch.from_numpy(target).float()
    outputs = len(classes) if discrete else y.shape[1]
    with _small_training(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            *(nn.Linear(x.shape[1], MLP_HIDDEN), nn.ReLU()),
            *(nn.Linear(MLP_HIDDEN, MLP_HIDDEN), nn.ReLU()),
            nn.Linear(MLP_HIDDEN, outputs),
        )
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-2)
        rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=MLP_STEPS)
        for _ in range(MLP_STEPS):
            batch = torch.randint(len(inputs), (min(MLP_BATCH, len(inputs)),))
            prediction = net(inputs[batch])
            loss_of = F.cross_entropy if discrete else F.mse_loss
            loss = loss_of(prediction, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
        answer = net(torch.from_numpy(x_new).float()).detach().numpy()
    return classes[answer.argmax(1)] if discrete else answer.astype(np.float64)
