"""Clusters of latent actions."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int64

ITERATIONS = 50


def cluster(points: Float[np.ndarray, "m f"], count: int) -> Int64[np.ndarray, " m"]:
    """Return the cluster of each point by k-means, which starts from farthest points; no cluster is empty."""
    centers = [points[np.square(points - points.mean(0)).sum(1).argmin()]]
    nearest = np.square(points - centers[0]).sum(1)
    while len(centers) < count and nearest.max() > 0:
        centers.append(points[nearest.argmax()])
        nearest = np.minimum(nearest, np.square(points - centers[-1]).sum(1))
    group = np.zeros(len(points), np.int64)
    for iteration in range(ITERATIONS):
        distance = np.stack([np.square(points - center).sum(1) for center in centers], axis=1)
        if np.array_equal(distance.argmin(1), group) and iteration:
            break
        group = distance.argmin(1)
        centers = [points[group == g].mean(0) for g in range(len(centers)) if (group == g).any()]
    return np.unique(group, return_inverse=True)[1]
