"""Codebook health: number of used codes, and how evenly they are used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Int


@dataclass(frozen=True, kw_only=True)
class CodebookHealth:
    """Use of a codebook over a set of transitions."""

    size: int
    """Number of codes."""
    used: int
    """Number of codes that occur at least once, at any token position."""
    dead: int
    """Number of codes that never occur."""
    perplexity: float
    """Exponential of the entropy, averaged over token positions: 1 (one code) .. size (all equally)."""


def codebook_health(codes: Int[np.ndarray, "m k"], size: int) -> CodebookHealth:
    """Return the usage of codes in m transitions with k tokens each.

    The perplexity is averaged over positions instead of computed over all of them, so that a model in which
    each token is stuck at its own code counts as collapsed.

    Raises:
        ValueError: a code is outside 0..size-1, or there are no codes.
    """
    if codes.size == 0 or codes.min() < 0 or codes.max() >= size:
        raise ValueError(f"codes must be in 0..{size - 1} and not empty, got shape {codes.shape}")
    counts = np.stack([np.bincount(column, minlength=size) for column in codes.T])
    shares = counts / counts.sum(1, keepdims=True)
    entropy = -(shares * np.log(np.where(shares > 0, shares, 1.0))).sum(1)
    used = int((counts.sum(0) > 0).sum())
    return CodebookHealth(size=size, used=used, dead=size - used, perplexity=float(np.exp(entropy).mean()))
