"""Selection of discrete actions: the most likely class, or a class drawn from the predicted distribution.

A policy without memory that always takes the most likely action can repeat itself forever, such as turning
left and right in front of a wall; sampled actions leave such loops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor

from latentact.config import Between, OneOf

SELECTIONS = ("greedy", "sample")
Selection = Annotated[str, OneOf(SELECTIONS)]
Temperature = Annotated[float, Between(1e-3, 1e3)]
Choose = Callable[[Tensor], Tensor]
"""Scores ``[*b, classes]`` to classes, int64 ``[*b]``."""


def greedy(scores: Tensor) -> Tensor:
    """Return the most likely classes."""
    return scores.argmax(-1)


def selector(selection: str, temperature: float) -> Choose:
    """Return the selector for `greedy`, or for `sample` with a softmax temperature.

    Draws use PyTorch's CPU generator, so `torch.manual_seed` makes them reproducible.
    """

    def sample(scores: Tensor) -> Tensor:
        likely = (scores.float().cpu() / temperature).softmax(-1)
        return torch.multinomial(likely.flatten(0, -2), 1).view(scores.shape[:-1]).to(scores.device)

    return sample if selection == "sample" else greedy
