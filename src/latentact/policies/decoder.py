"""Grounding: a small network from latent actions, and optionally the robot state, to robot actions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from latentact.errors import UserError
from latentact.nn.mlp import mlp
from latentact.types import ActionSpace


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Settings of the decoder from latent to robot actions."""

    hidden: tuple[int, ...] = (128, 128)
    """Widths of the hidden layers; empty: a linear decoder."""
    use_state: bool = False
    """Whether the decoder takes the robot state, if robot actions depend on it."""
    mixture: bool = False
    """For policies of one code per step and discrete actions: whether the decoder takes the vector of a code,
    and the policy acts by p(a|o) = sum_c p(c|o) p(a|c). Otherwise it takes the probabilities of codes."""

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
        codes: number of codes of a mixture, whose vectors it holds; 0 without.
    """

    mean: Tensor
    std: Tensor
    codebook: Tensor

    def __init__(
        self,
        config: DecoderConfig,
        latent_size: int,
        state_size: int,
        space: ActionSpace,
        steps: int,
        codes: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.space, self.steps = config, space, steps
        self.net = mlp(latent_size + state_size, config.hidden, space.size * steps)
        numbers = 0 if space.discrete else space.size
        self.register_buffer("mean", torch.zeros(numbers))
        self.register_buffer("std", torch.ones(numbers))
        if codes:
            self.register_buffer("codebook", torch.zeros(codes, latent_size))

    @property
    def output_layer(self) -> nn.Linear:
        """The last layer."""
        return self.net[-1]  # type: ignore[return-value]

    def set_codebook(self, codes: np.ndarray, vectors: np.ndarray) -> None:
        """Set the vectors of codes, normalized by those given; codes without one keep the mean, 0.

        Args:
            codes: int64 ``[n]``.
            vectors: float32 ``[n, d]``.
        """
        normal = (vectors - vectors.mean(0)) / vectors.std(0).clip(min=1e-3)
        self.codebook[torch.from_numpy(codes)] = torch.from_numpy(normal)

    def mix(
        self, probabilities: Float[Tensor, "b l n"], state: Float[Tensor, "b s"] | None
    ) -> Float[Tensor, "b l2 a"]:
        """Return the log-probabilities of actions, given those of the codes of a mixture."""
        batch = 1 if state is None else len(state)
        scores = self(self.codebook.expand(batch, -1, -1), state).unflatten(1, (-1, self.steps))
        mixed = torch.einsum(
            "bln,bnsa->blsa", probabilities, scores.softmax(-1).expand(len(probabilities), -1, -1, -1)
        )
        return mixed.clamp(min=1e-12).log().flatten(1, 2)

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
