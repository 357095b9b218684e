"""Samples of a training step, as a function of (seed, step).

They do not depend on the number of processes, and a resumed run draws the same. A mixture draws each sample
from a dataset with probability proportional to its weight. With a window, samples come from a few shards at a
time: the shards of an epoch are put in random order, and the window moves along as the samples of its shards
are used.
"""

from __future__ import annotations

import logging
from functools import cached_property

import numpy as np
from jaxtyping import Int64

from latentact.data.store import FrameStore

log = logging.getLogger(__name__)


class Order:
    """Draws the samples of a training step.

    Args:
        store: the data.
        rows: row of each sample in the store, ascending.
    """

    def __init__(self, store: FrameStore, rows: Int64[np.ndarray, " m"]) -> None:
        self._store, self._rows = store, rows
        self._window = store.sampling.window if store.sampling else 0

    @cached_property
    def _parts(self) -> list[tuple[float, Int64[np.ndarray, "g 2"]]]:
        """Weight of each dataset, and the first sample, and last + 1, of each of its shards."""
        store, rows, found = self._store, self._rows, []
        sampling = store.sampling
        for first, last, weight in sampling.parts if sampling else ():
            inside = [group for group in store.groups if first <= group[0] < last]
            groups = inside if self._window and inside else [(first, last)]
            starts = np.append(store.starts, store.num_frames)
            bounds = np.searchsorted(rows, starts[np.array(groups)])
            bounds = bounds[bounds[:, 0] < bounds[:, 1]]
            if not len(bounds):
                log.warning("episodes %d to %d of %s have no sample to draw", first, last - 1, store.path)
                continue
            found.append((weight, bounds))
        return found

    def __call__(self, seed: int, step: int, size: int) -> Int64[np.ndarray, " size"]:
        """Return the indices of the samples of a step."""
        rng = np.random.default_rng((seed, step))
        if self._store.sampling is None:
            return rng.integers(len(self._rows), size=size)
        weights = np.array([weight for weight, _ in self._parts])
        shares = weights / weights.sum()
        part, place = rng.choice(len(shares), size=size, p=shares), rng.random(size)
        drawn = np.zeros(size, np.int64)
        for number, share in enumerate(shares):
            bounds = self._open_window(number, seed, float(step * size * share))
            ends = np.cumsum(bounds[:, 1] - bounds[:, 0])
            mine = np.flatnonzero(part == number)
            within = (place[mine] * ends[-1]).astype(np.int64)
            group = np.searchsorted(ends, within, "right")
            drawn[mine] = bounds[group, 1] - (ends[group] - within)
        return drawn

    def _open_window(self, part: int, seed: int, used: float) -> Int64[np.ndarray, "w 2"]:
        """Return the shards to draw from after this number of samples."""
        bounds = self._parts[part][1]
        if not self._window or len(bounds) <= self._window:
            return bounds
        epoch, within = divmod(used, float((bounds[:, 1] - bounds[:, 0]).sum()))
        mixed = np.random.default_rng((seed, int(epoch), part)).permutation(bounds)
        ends = np.cumsum(mixed[:, 1] - mixed[:, 0])
        shard = min(int(np.searchsorted(ends, within, "right")), len(mixed) - 1)
        first = shard // self._window * self._window
        return mixed[first : first + self._window]
