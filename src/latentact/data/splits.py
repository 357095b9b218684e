"""Which episodes are trained on, held out, and labeled."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from latentact.data.cache import FrameStore
from latentact.errors import UserError

logger = logging.getLogger(__name__)


def split_episodes(store: FrameStore, *, held_out: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of the episodes to train on and of those held out, drawn by `seed`, each ascending.

    Args:
        store: the data.
        held_out: fraction of episodes to hold out; at least one on either side where there are two or more.
        seed: decides the draw.

    Raises:
        UserError: the fraction is not between 0 and 1.
    """
    total = store.num_episodes
    count = split_sizes(total, held_out)[1]
    if total == 1:
        logger.warning("%s has one episode: it is trained on and evaluated on", store.path)
        return np.array([0]), np.array([0])
    order = np.random.default_rng(seed).permutation(total)
    return np.sort(order[count:]), np.sort(order[:count])


def split_sizes(total: int, held_out: float) -> tuple[int, int]:
    """Return how many of `total` episodes `split_episodes` trains on and how many it holds out.

    Raises:
        UserError: the fraction is not between 0 and 1.
    """
    if not 0 <= held_out < 1:
        raise UserError(f"held_out is {held_out}; it must be at least 0 and less than 1.")
    if total == 1:
        return 1, 1
    count = min(max(round(held_out * total), 1), total - 1)
    return total - count, count


def choose_labeled(train_episodes: Sequence[int] | np.ndarray, k: int | None, seed: int) -> np.ndarray:
    """Return the k episodes whose actions may be seen, ascending; those for a smaller k are among them.

    Args:
        train_episodes: to choose from.
        k: how many; None: all.
        seed: decides the draw.

    Raises:
        UserError: k is negative, or larger than the number of episodes.
    """
    episodes = np.sort(np.asarray(train_episodes, np.int64))
    if k is None:
        return episodes
    if not 0 <= k <= len(episodes):
        raise UserError(
            f"{k} labeled episodes are requested, but there are {len(episodes)} training episodes; give 0 to "
            f"{len(episodes)}."
        )
    return np.sort(np.random.default_rng(seed).permutation(episodes)[:k])
