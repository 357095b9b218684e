"""Action heads: hidden states of the action queries to a chunk of robot actions.

`chunk` regresses all actions at once by L1 (OpenVLA-OFT, arXiv 2502.19645); for a discrete action space it
classifies. `bins` classifies each dimension into bins of equal frequency (LAPA, 2410.11758). `flow`
integrates a velocity field that a small transformer learns by flow matching (pi0, 2410.24164).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor, nn

from latentact.config import Between, OneOf, check_bounds
from latentact.errors import UserError, require_one_of
from latentact.policies.selection import Choose, greedy
from latentact.types import ActionSpace

KINDS = ("chunk", "bins", "flow")


@dataclass(frozen=True, kw_only=True)
class ActionHeadConfig:
    """Settings of the action head."""

    kind: Annotated[str, OneOf(KINDS)] = "chunk"
    """chunk: L1, or cross-entropy of discrete actions; bins: equal-frequency bins (LAPA); flow: flow
    matching."""
    chunk_size: Annotated[int, Between(1, 1024)] = 8
    """Actions predicted at once, one per environment step."""
    n_action_steps: Annotated[int, Between(1, 1024)] = 4
    """Actions executed before the policy observes again; at most chunk_size."""
    bins: Annotated[int, Between(2, 4096)] = 256
    """bins: classes per action dimension."""
    flow_steps: Annotated[int, Between(1, 1000)] = 10
    """flow: Euler steps per prediction."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        check_bounds(self)
        require_one_of("head.kind", self.kind, KINDS)
        if self.n_action_steps > self.chunk_size:
            raise UserError(
                f"head.n_action_steps must be at most head.chunk_size ({self.chunk_size}), got "
                f"{self.n_action_steps}."
            )


class VlaHead(nn.Module, ABC):
    """Map hidden states of the queries to actions.

    Args:
        config: settings.
        space: robot action space.
        width: size of a hidden state.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ActionHeadConfig, space: ActionSpace, width: int) -> None:
        super().__init__()
        if space.discrete and config.kind != "chunk":
            raise UserError(
                f"head.kind must be chunk for discrete actions, got {config.kind!r} for {space}. Use "
                f"head.kind=chunk, which classifies them."
            )
        self.config, self.space = config, space
        numbers = 0 if space.discrete else space.size
        self.register_buffer("mean", torch.zeros(numbers))
        self.register_buffer("std", torch.ones(numbers))

    def set_stats(self, actions: Shaped[np.ndarray, "n *a"]) -> None:
        """Set the statistics of continuous actions from the labeled steps."""
        if not self.space.discrete:
            self.mean.copy_(torch.from_numpy(actions.mean(0)))
            self.std.copy_(torch.from_numpy(actions.std(0)).clamp(min=1e-4))

    @abstractmethod
    def loss(
        self, hidden: Float[Tensor, "b l h"], actions: Shaped[Tensor, "b l *a"], mask: Bool[Tensor, "b l"]
    ) -> Tensor:
        """Return the mean loss over unmasked steps; actions are classes or values in the robot's units."""

    @abstractmethod
    def actions(self, hidden: Float[Tensor, "b l h"], choose: Choose = greedy) -> Shaped[Tensor, "b l *a"]:
        """Return classes selected by `choose`, or values in the robot's units."""

    def normal(self, actions: Tensor) -> Tensor:
        """Return continuous actions normalized to zero mean and unit variance."""
        return (actions.nan_to_num() - self.mean) / self.std


class ChunkHead(VlaHead):
    """Predict all actions of the chunk in one pass."""

    def __init__(self, config: ActionHeadConfig, space: ActionSpace, width: int) -> None:
        super().__init__(config, space, width)
        self.net = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, space.size)
        )

    def loss(self, hidden: Tensor, actions: Tensor, mask: Tensor) -> Tensor:
        """Return the L1 error of normalized actions, or the cross-entropy of classes."""
        out = self.net(hidden).float()
        if self.space.discrete:
            each = F.cross_entropy(out.flatten(0, 1), actions.flatten(), reduction="none").view(mask.shape)
        else:
            each = (out - self.normal(actions)).abs().mean(2)
        return _mean(each, mask)

    def actions(self, hidden: Tensor, choose: Choose = greedy) -> Tensor:
        """Return the selected classes, or the regressed values."""
        out = self.net(hidden).float()
        return choose(out) if self.space.discrete else out * self.std + self.mean


class BinsHead(VlaHead):
    """Classify each action dimension into bins; an action is the center of its bin."""

    edges: Tensor

    def __init__(self, config: ActionHeadConfig, space: ActionSpace, width: int) -> None:
        super().__init__(config, space, width)
        self.net = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, space.size * config.bins))
        self.register_buffer("edges", torch.linspace(-1, 1, config.bins + 1).expand(space.size, -1).clone())

    def set_stats(self, actions: np.ndarray) -> None:
        """Set the edges of the bins at quantiles of the labeled steps."""
        super().set_stats(actions)
        quantiles = np.quantile(actions, np.linspace(0, 1, self.config.bins + 1), axis=0)
        self.edges.copy_(torch.from_numpy(quantiles.T))

    def classes(self, actions: Float[Tensor, "b l a"]) -> Int64[Tensor, "b l a"]:
        """Return the bin of each value; bins include their lower edge.

        A value that many actions share, such as that of a gripper, is a repeated edge: its bin has no width,
        and its center is the value.
        """
        values = actions.nan_to_num().flatten(0, 1).T.contiguous()  # [a, b * l]
        below, upto = (torch.searchsorted(self.edges, values, right=right) for right in (False, True))
        found = torch.where(upto - below > 1, below, upto - 1).clamp(0, self.config.bins - 1)
        return found.T.reshape(actions.shape)

    def loss(self, hidden: Tensor, actions: Tensor, mask: Tensor) -> Tensor:
        """Return the cross-entropy of the bins."""
        logits = self.net(hidden).float().unflatten(-1, (self.space.size, self.config.bins))
        target = self.classes(actions)
        each = F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="none")
        return _mean(each.view(actions.shape).mean(2), mask)

    def actions(self, hidden: Tensor, choose: Choose = greedy) -> Tensor:
        """Return the center of the most likely bin of each dimension."""
        chosen = self.net(hidden).unflatten(-1, (self.space.size, self.config.bins)).argmax(-1)
        middles = (self.edges[:, 1:] + self.edges[:, :-1]) / 2
        return middles[torch.arange(self.space.size, device=chosen.device), chosen]


class FlowHead(VlaHead):
    """A velocity field from noise to actions, conditioned on the queries' hidden states."""

    def __init__(self, config: ActionHeadConfig, space: ActionSpace, width: int) -> None:
        super().__init__(config, space, width)
        heads = next(n for n in (8, 4, 2, 1) if width % n == 0)
        layer = nn.TransformerDecoderLayer(width, heads, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.inward = nn.Linear(space.size, width)
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.place = nn.Embedding(config.chunk_size, width)
        self.norm = nn.LayerNorm(width)
        self.decoder = nn.TransformerDecoder(layer, num_layers=2)
        self.outward = nn.Linear(width, space.size)

    def loss(self, hidden: Tensor, actions: Tensor, mask: Tensor) -> Tensor:
        """Return the squared error of the velocity at a random time, t ~ 0.001 + 0.999 Beta(1.5, 1)."""
        target = self.normal(actions)
        noise = torch.randn_like(target)
        time = torch.rand(len(target), device=target.device).pow(1 / 1.5) * 0.999 + 0.001
        mixed = time[:, None, None] * noise + (1 - time[:, None, None]) * target
        return _mean((self._velocity(hidden, mixed, time) - (noise - target)).square().mean(2), mask)

    def actions(self, hidden: Tensor, choose: Choose = greedy) -> Tensor:
        """Return actions integrated from noise at time 1 to time 0; the same noise for every sample."""
        steps, shape = self.config.flow_steps, (1, self.config.chunk_size, self.space.size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        sample = noise.to(hidden.device).expand(len(hidden), -1, -1)
        for step in range(steps):
            time = torch.full((len(hidden),), 1 - step / steps, device=hidden.device)
            sample = sample - self._velocity(hidden, sample, time) / steps
        return sample * self.std + self.mean

    def _velocity(self, hidden: Tensor, mixed: Tensor, time: Tensor) -> Tensor:
        frequencies = torch.logspace(0, 3, 32, device=time.device)
        angles = time[:, None] * frequencies
        when = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
        tokens = self.inward(mixed) + when[:, None] + self.place.weight
        return self.outward(self.decoder(tokens, self.norm(hidden))).float()


HEADS: dict[str, type[VlaHead]] = {"chunk": ChunkHead, "bins": BinsHead, "flow": FlowHead}


def _mean(each: Float[Tensor, "b l"], mask: Bool[Tensor, "b l"]) -> Tensor:
    return (each * mask).sum() / mask.sum().clamp(min=1)
