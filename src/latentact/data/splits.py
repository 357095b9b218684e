"""Splits of the episodes: training, held out, labeled."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from latentact.data.store import FrameStore
from latentact.errors import UserError

logger = logging.getLogger(__name__)


def split_episodes(store: FrameStore, *, held_out: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the training and held-out episodes, drawn by `seed`, each ascending.

    Args:
        store: the data.
        held_out: fraction of episodes to hold out; at least one on either side if there are two or more.
        seed: seed of the draw.

    Raises:
        UserError: the fraction is not in [0, 1).
    """
    total = store.num_episodes
    count = split_sizes(total, held_out)[1]
    if total == 1:
        logger.warning("%s has one episode: it is trained on and evaluated on", store.path)
        return np.array([0]), np.array([0])
    order = np.random.default_rng(seed).permutation(total)
    return np.sort(order[count:]), np.sort(order[:count])


def training_episodes(store: FrameStore, *, held_out: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the same as `split_episodes`, but all episodes and none where the fraction is 0."""
    if held_out == 0:
        return np.arange(store.num_episodes), np.arange(0)
    return split_episodes(store, held_out=held_out, seed=seed)


def split_sizes(total: int, held_out: float) -> tuple[int, int]:
    """Return the numbers of training and held-out episodes in a split of `total` episodes.

    Raises:
        UserError: the fraction is not in [0, 1).
    """
    if not 0 <= held_out < 1:
        raise UserError(f"held_out must be at least 0 and less than 1, got {held_out}.")
    if total == 1:
        return 1, 1
    count = min(max(round(held_out * total), 1), total - 1)
    return total - count, count


def choose_labeled(
    train_episodes: Sequence[int] | np.ndarray,
    k: int | None,
    seed: int,
    planned: Int64[np.ndarray, " p"] | None = None,
) -> np.ndarray:
    """Return the k labeled episodes, ascending; those for a smaller k are a subset.

    Args:
        train_episodes: episodes to choose from.
        k: number of episodes; None: all.
        seed: seed of the draw.
        planned: episodes in the order of a plan (`latentact.data.plan.read_plan`), of which the first k are
            chosen; None: drawn.

    Raises:
        UserError: k is negative, or larger than the number of episodes, or a planned episode is held out.
    """
    order = draw_order(train_episodes, seed) if planned is None else planned
    if planned is not None and (wrong := np.setdiff1d(planned, train_episodes)).size:
        raise UserError(
            f"the plan must list training episodes only, got {len(wrong)} of {len(planned)} that are held "
            f"out. Use the held_out and split_seed of the plan, in compare by seeds=[split_seed]."
        )
    if k is None:
        return np.sort(order)
    if not 0 <= k <= len(order):
        kind = "training episodes" if planned is None else "episodes of the plan"
        raise UserError(
            f"labeled episodes must be between 0 and {len(order)}, the number of {kind}, got {k}."
        )
    return np.sort(order[:k])


def draw_order(train_episodes: Sequence[int] | np.ndarray, seed: int) -> Int64[np.ndarray, " e"]:
    """Return the training episodes in the order in which they are labeled without a plan."""
    return np.random.default_rng(seed).permutation(np.sort(np.asarray(train_episodes, np.int64)))
