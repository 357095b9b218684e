"""Latent actions as a condition: standardized, projected, and sometimes hidden (classifier-free style)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

SMALLEST_SHARE = 0.01
"""Minimum standard deviation relative to the largest, so that constant dimensions are not amplified."""


class TokenProjection(nn.Module):
    """Project the tokens of a few transitions to one vector.

    Args:
        steps: number of transitions.
        token_dim: dimensions per transition.
        width: dimensions of the output.
        dropout: fraction of training samples that get the learned "no guide" vector instead.
        stats: `mean` and `std` of the tokens, each ``[token_dim]``; None: tokens are not standardized.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, *, steps: int, token_dim: int, width: int, dropout: float, stats: Mapping[str, Any] | None
    ) -> None:
        super().__init__()
        mean, std = np.zeros(token_dim), np.ones(token_dim)
        if stats is not None:
            mean, std = np.asarray(stats["mean"]), np.asarray(stats["std"])
            std = np.maximum(std, max(SMALLEST_SHARE * std.max(), 1e-6))
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))
        self.dropout = dropout
        self.network = nn.Sequential(nn.Linear(steps * token_dim, width), nn.GELU(), nn.Linear(width, width))
        self.no_guide = nn.Parameter(torch.zeros(width)) if dropout else None

    def forward(
        self, tokens: Float[Tensor, "b n d"], valid: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b w"]:
        """Return the condition; invalid transitions get the mean token."""
        x = (tokens - self.mean) / self.std
        if valid is not None:
            x = x * valid[..., None]
        x = self.network(x.flatten(1))
        if self.no_guide is None or not self.training:
            return x
        hidden = torch.rand(len(x), 1, device=x.device) < self.dropout
        return torch.where(hidden, self.no_guide, x)

    def without_guide(self, batch: int) -> Float[Tensor, "b w"]:
        """Return the condition of `batch` samples that have no guide; needs `dropout` above 0."""
        assert self.no_guide is not None
        return self.no_guide.expand(batch, -1)
