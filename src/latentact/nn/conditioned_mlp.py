"""A residual MLP whose condition is an input of every block (LAOM, 2502.00379)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class ConditionedMlp(nn.Module):
    """Map a vector and a condition to a vector: three residual ReLU6 blocks with layer normalization.

    Args:
        in_features: length of the vector.
        condition: length of the condition.
        hidden: width of the blocks, expanded fourfold inside.
        out_features: length of the output vector.
    """

    def __init__(self, in_features: int, condition: int, hidden: int, out_features: int) -> None:
        super().__init__()
        widths = (in_features, hidden, hidden)
        self.enter = nn.ModuleList(nn.Linear(width + condition, hidden) for width in widths)
        self.grow = nn.ModuleList(nn.Linear(hidden, 4 * hidden) for _ in widths)
        self.shrink = nn.ModuleList(nn.Linear(4 * hidden, hidden) for _ in widths)
        self.norm = nn.ModuleList(nn.LayerNorm(hidden) for _ in widths)
        self.leave = nn.Linear(hidden, out_features)

    def forward(self, x: Float[Tensor, "b i"], condition: Float[Tensor, "b c"]) -> Float[Tensor, "b o"]:
        """Return the output vector."""
        for enter, grow, shrink, norm in zip(self.enter, self.grow, self.shrink, self.norm, strict=True):
            x = enter(torch.cat([x, condition.to(x.dtype)], dim=1))
            x = norm(x + shrink(F.relu6(grow(x))))
        return self.leave(x)
