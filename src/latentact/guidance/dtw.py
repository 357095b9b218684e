"""Dynamic time warping (Sakoe and Chiba 1978): the alignment of two sequences with the smallest distance."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64, Int64

from latentact.errors import UserError

LARGEST = 25_000_000
"""Maximum product of the lengths."""


def align(
    a: Float64[np.ndarray, "n f"], b: Float64[np.ndarray, "m f"]
) -> tuple[Int64[np.ndarray, " p"], Int64[np.ndarray, " p"]]:
    """Return the matched steps of both, from (0, 0) to (n - 1, m - 1), each 0 or 1 after the previous.

    The sum of squared distances of matched steps is the smallest; ties are broken in favor of advancing both
    sequences.

    Raises:
        UserError: the sequences are too long.
    """
    n, m = len(a), len(b)
    if n * m > LARGEST:
        raise UserError(
            f"guides must have at most {LARGEST} pairs of steps to be aligned, got {n} x {m}. Shorten them "
            "with slice=START:STOP."
        )
    distance = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    distance = np.maximum(distance, 0)
    total = np.full((n + 1, m + 1), np.inf)
    total[0, 0] = 0
    for diagonal in range(n + m - 1):
        i = np.arange(max(0, diagonal - m + 1), min(n, diagonal + 1))
        j = diagonal - i
        before = np.minimum(total[i, j], np.minimum(total[i, j + 1], total[i + 1, j]))
        total[i + 1, j + 1] = distance[i, j] + before
    i, j = n, m
    path = [(i - 1, j - 1)]
    while (i, j) != (1, 1):
        back = ((i - 1, j - 1), (i - 1, j), (i, j - 1))
        i, j = min(back, key=lambda step: total[step])
        path.append((i - 1, j - 1))
    mine, theirs = np.array(path[::-1]).T
    return mine, theirs
