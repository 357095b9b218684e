"""Grounding: a small network from latent actions, and optionally the robot state, to robot actions."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from latentact.errors import UserError
from latentact.types import ActionSpace


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Settings of the decoder from latent to robot actions."""

    hidden: tuple[int, ...] = (128, 128)
    """Widths of the hidden layers; empty: a linear decoder."""
    use_state: bool = False
    """Whether the decoder takes the robot state, if robot actions depend on it."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        if any(width < 1 for width in self.hidden):
            raise UserError(f"decoder.hidden must be empty or widths of at least 1, got {list(self.hidden)}.")


class ActionDecoder(nn.Module):
    """Map a latent action (normalized vector or class probabilities) to robot actions of its steps.

    Args:
        config: settings.
        latent_size: dimensions of the latent action.
        state_size: dimensions of the robot state; 0: not used.
        space: robot action space.
        steps: environment steps per latent action.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, config: DecoderConfig, latent_size: int, state_size: int, space: ActionSpace, steps: int
    ) -> None:
        super().__init__()
        self.config, self.space, self.steps = config, space, steps
        widths = (latent_size + state_size, *config.hidden)
        layers: list[nn.Module] = []
        for i, o in pairwise(widths):
            layers += [nn.Linear(i, o), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(widths[-1], space.size * steps))
        numbers = 0 if space.discrete else space.size
        self.register_buffer("mean", torch.zeros(numbers))
        self.register_buffer("std", torch.ones(numbers))

    def set_action_stats(self, actions: np.ndarray) -> None:
        """Set mean and standard deviation of continuous actions from the labeled steps, ``[n, a]``."""
        if not self.space.discrete:
            self.mean.copy_(torch.from_numpy(actions.mean(0)))
            self.std.copy_(torch.from_numpy(actions.std(0)).clamp(min=1e-4))

    def forward(
        self, latents: Float[Tensor, "b l f"], state: Float[Tensor, "b s"] | None
    ) -> Float[Tensor, "b l2 a"]:
        """Return logits or normalized actions of every environment step; l2 = l x steps."""
        if state is not None:
            latents = torch.cat([latents, state[:, None].expand(-1, latents.shape[1], -1)], dim=2)
        return self.net(latents).unflatten(2, (self.steps, self.space.size)).flatten(1, 2).float()

    def unnormalize(self, actions: Tensor) -> Tensor:
        """Return continuous actions in the robot's units."""
        return actions * self.std + self.mean

    def action_loss(self, scores: Float[Tensor, "b l a"], actions: Tensor, mask: Tensor) -> Tensor:
        """Return the cross-entropy, or squared error of normalized actions, over the labeled steps.

        Args:
            scores: output of `forward`.
            actions: int64 ``[b, l]`` or float32 ``[b, l, a]``.
            mask: bool ``[b, l]``.
        """
        if self.space.discrete:
            target = actions.masked_fill(~mask, -1)
            each = F.cross_entropy(scores.flatten(0, 1), target.flatten(), ignore_index=-1, reduction="none")
            return each.sum() / mask.sum().clamp(min=1)
        error = (scores - (actions.nan_to_num() - self.mean) / self.std).square().mean(2)
        return (error * mask).sum() / mask.sum().clamp(min=1)
