"""Which episodes to label: those that represent all others best.

An episode is a point: the mean of its latent actions, or of a policy's features. A set of episodes covers the
training episodes by how near each of these is to one of the set (facility location). Coverage is submodular,
so that adding the best episode each time is within 1 - 1/e of the best set (Nemhauser et al., 1978).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Int64

from latentact.data.splits import draw_order
from latentact.evaluation.lam.clusters import cluster

REFERENCES = 4096
"""Most training episodes whose nearest labeled episode is looked for; of more, evenly spaced ones."""
DRAWS = 64
"""Random choices of episodes that coverage is compared with."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Coverage:
    """Coverage of the training episodes by labeled ones."""

    distance: Float[np.ndarray, "r e"]
    """From each reference to each episode, as a fraction of the mean distance to the mean episode."""
    weight: Float64[np.ndarray, " r"]
    """Share of each reference; sums to 1."""

    @classmethod
    def fit(
        cls,
        points: Float[np.ndarray, "e f"],
        train: Int64[np.ndarray, " t"],
        importance: Float[np.ndarray, " e"] | None = None,
    ) -> Coverage:
        """Measure the distances between episodes.

        Args:
            points: one point per episode.
            train: training episodes with a point.
            importance: weight of each episode, such as the decoder's uncertainty; None: equal.
        """
        chosen = train[np.unique(np.linspace(0, len(train) - 1, min(len(train), REFERENCES)).astype(int))]
        reference = points[chosen]
        squares = np.square(reference).sum(1)[:, None] + np.square(points).sum(1) - 2 * reference @ points.T
        weight = np.ones(len(chosen)) if importance is None else importance[chosen].astype(float)
        weight /= weight.sum()
        scale = np.linalg.norm(reference - reference.mean(0), axis=1) @ weight
        return cls(distance=np.sqrt(squares.clip(min=0)) / max(scale, 1e-9), weight=weight)

    def of(self, chosen: Int64[np.ndarray, " k"]) -> float:
        """Return the coverage by at least one episode: 1 if all are labeled, 0 if no nearer than the mean.

        A few episodes far from the others can be below 0.
        """
        return float(1 - self.weight @ self.distance[:, chosen].min(1, initial=np.inf))

    def greedy(
        self, labeled: Int64[np.ndarray, " l"], left: Int64[np.ndarray, " m"], budget: int
    ) -> Int64[np.ndarray, " b"]:
        """Return the episodes to label next, each the one of those left that adds most coverage."""
        nearest = self.distance[:, labeled].min(1, initial=np.inf)[:, None]
        chosen: list[int] = []
        for _ in range(min(budget, len(left))):
            best = int((self.weight @ np.minimum(nearest, self.distance[:, left])).argmin())
            chosen.append(int(left[best]))
            nearest = np.minimum(nearest, self.distance[:, left[best : best + 1]])
            left = np.delete(left, best)
        return np.array(chosen, np.int64)

    def random_curve(self, train: Int64[np.ndarray, " t"], most: int) -> Float64[np.ndarray, " m"]:
        """Return the mean coverage by 1, 2, ..., `most` random training episodes."""
        draws = [draw_order(train, seed)[:most] for seed in range(DRAWS)]
        near = [self.weight @ np.minimum.accumulate(self.distance[:, draw], axis=1) for draw in draws]
        return 1 - np.array(near).mean(0)


def random_equivalent(covered: float, curve: Float64[np.ndarray, " m"]) -> float:
    """Return the least number of random episodes that cover as much, between 1 and the curve's length."""
    values, first = np.unique(curve, return_index=True)
    return float(np.interp(covered, values, 1 + first))


def means_of(
    values: Float[np.ndarray, "n f"], episode: Int64[np.ndarray, " n"], episodes: int
) -> Float64[np.ndarray, "e f"]:
    """Return the mean of the values of each episode; that of all where it has none."""
    steps = np.bincount(episode, minlength=episodes)[:, None]
    sums = np.zeros((episodes, values.shape[1]))
    np.add.at(sums, episode, values)
    return np.where(steps > 0, sums / steps.clip(min=1), values.mean(0))


def standardized(values: Float[np.ndarray, "n f"]) -> Float[np.ndarray, "n f"]:
    """Return values with mean 0 and standard deviation 1 in each dimension."""
    return (values - values.mean(0)) / values.std(0).clip(min=1e-6)


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidates:
    """What a method chooses by."""

    coverage: Coverage
    points: Float[np.ndarray, "e f"]
    """One point per episode."""
    steps: Int64[np.ndarray, " e"]
    """Latent actions of each episode."""
    train: Int64[np.ndarray, " t"]
    """Training episodes."""
    labeled: Int64[np.ndarray, " l"]
    """Those that are labeled already."""
    seed: int = 0
    """Seed of the labeled episodes."""

    @property
    def left(self) -> Int64[np.ndarray, " m"]:
        """Training episodes that are not labeled and have latent actions."""
        return np.setdiff1d(self.train[self.steps[self.train] > 0], self.labeled)


def by_coverage(given: Candidates, budget: int) -> Int64[np.ndarray, " b"]:
    """Return the episodes that add most coverage."""
    return given.coverage.greedy(given.labeled, given.left, budget)


def by_chance(given: Candidates, budget: int) -> Int64[np.ndarray, " b"]:
    """Return random episodes: those that every stage labels without a plan."""
    order = draw_order(given.train, given.seed)
    return order[np.isin(order, given.left)][:budget]


def by_length(given: Candidates, budget: int) -> Int64[np.ndarray, " b"]:
    """Return the longest episodes."""
    return given.left[np.argsort(-given.steps[given.left], kind="stable")][:budget]


def by_kmeans(given: Candidates, budget: int) -> Int64[np.ndarray, " b"]:
    """Return the episode nearest to the center of each cluster of episodes, largest first."""
    left = given.left
    points = given.points[left]
    group = cluster(points, budget)
    chosen: list[int] = []
    for each in np.argsort(-np.bincount(group), kind="stable"):
        members = np.flatnonzero(group == each)
        nearest = np.square(points[members] - points[members].mean(0)).sum(1).argmin()
        chosen.append(int(left[members[nearest]]))
    rest = np.setdiff1d(left, chosen)  # where there are fewer distinct points than the budget
    return np.array([*chosen, *rest[: max(budget - len(chosen), 0)]], np.int64)


METHODS: dict[str, Callable[[Candidates, int], np.ndarray]] = {
    "coverage": by_coverage,
    "random": by_chance,
    "longest": by_length,
    "kmeans": by_kmeans,
}
"""Name -> method: (candidates, budget) -> episodes to label next, in order."""
