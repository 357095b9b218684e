"""The network of the built-in policies: frames, state and task words to a chunk of targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from latentact.errors import UserError, require_between
from latentact.nn.grid import CellEncoder
from latentact.nn.impala import Impala
from latentact.nn.patch import PatchEncoder
from latentact.policies.contract import Policy, PolicyConfig
from latentact.policies.spec import PolicySpec
from latentact.types import LatentActionSpec


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Settings of the network, shared by the methods of a comparison."""

    RENAMED: ClassVar = {"frames": "n_obs_steps", "chunk": "chunk_size", "execute": "n_action_steps"}

    backbone: str = "impala"
    """impala (LAPO's policy), patch (cheap patch network) or grid (embedded integer cells and an MLP)."""
    impala_scale: int = 4
    """impala: multiplier of the channels (16, 32, 32)."""
    patch: int = 8
    """patch: side of a patch in pixels."""
    channels: tuple[int, ...] = (64, 96)
    """patch: channels; two residual blocks each."""
    halve: bool = False
    """patch: whether each further level halves the resolution."""
    grid_values: int = 32
    """grid: number of values of an integer."""
    n_obs_steps: int = 1
    """Observed frames, latest last."""
    use_state: bool = False
    """Whether the network takes the robot state."""
    chunk_size: int = 1
    """Targets predicted at once."""
    n_action_steps: int = 1
    """Targets executed before the policy observes again; at most chunk_size."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        if self.backbone not in ("impala", "patch", "grid"):
            raise UserError(f"network.backbone must be impala, patch or grid, got {self.backbone!r}.")
        require_between("network.grid_values", self.grid_values, 1, 256)
        require_between("network.impala_scale", self.impala_scale, 1, 256)
        require_between("network.patch", self.patch, 1, 1 << 14)
        require_between("network.n_obs_steps", self.n_obs_steps, 1, 256)
        require_between("network.chunk_size", self.chunk_size, 1, 1 << 14)
        require_between(
            "network.n_action_steps (at most network.chunk_size)", self.n_action_steps, 1, self.chunk_size
        )


class NetworkPolicy(Policy):
    """The policy of `NetworkConfig`: a convolutional encoder, linear layers for the rest.

    Args:
        config: settings of the policy.
        network: settings of its network.
        spec: inputs and outputs of the policy.
        latent: spec of the latent actions.
    """

    def __init__(
        self,
        config: PolicyConfig,
        network: NetworkConfig,
        spec: PolicySpec,
        latent: LatentActionSpec | None = None,
    ) -> None:
        super().__init__(config, spec, latent)
        channels = spec.channels * network.n_obs_steps
        if network.backbone == "impala":
            scaled = tuple(network.impala_scale * c for c in (16, 32, 32))
            self.encoder = Impala(channels, spec.resolution, scaled)
        elif network.backbone == "grid":
            self.encoder = CellEncoder(
                network.n_obs_steps, spec.channels, spec.resolution, network.grid_values
            )
        else:
            self.encoder = PatchEncoder(
                channels, spec.resolution, network.patch, network.channels, halve=network.halve
            )
        extra = (spec.state_size if network.use_state else 0) + len(spec.words)
        self.extra = nn.Linear(extra, 256) if extra else None
        self.head = nn.Linear(256, network.chunk_size * spec.target.outputs)
        self.guide = None
        if spec.guide:
            tokens = spec.guide.size * len(spec.guide.offsets)
            self.guide = nn.Sequential(
                nn.Linear(256 + tokens + 1, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()
            )

    def features(self, frames: Tensor, state: Tensor | None, words: Tensor) -> Float[Tensor, "b 256"]:
        """Return 256 features per observation, ``[b, 256]``."""
        grid = isinstance(self.encoder, CellEncoder)
        seen = self._cells(frames, self.encoder.embed.values) if grid else self.normal_frames(frames)
        features = self.encoder(torch.cat(seen.unbind(1), dim=1))
        if self.extra is not None:
            parts = [self.normal_state(state)] if self.config.network.use_state else []
            features = features + self.extra(torch.cat([*parts, words], dim=1))
        return features

    def _cells(self, frames: Tensor, values: int) -> Tensor:
        """Return grids of integers below `values`, at the policy's resolution (nearest cell).

        Raises:
            UserError: they hold other integers.
        """
        if (highest := int(frames.max())) >= values:
            raise UserError(
                f"frames must be grids of integers below {values} (network.grid_values), got {highest}. Set "
                "network.backbone=patch for images."
            )
        if frames.shape[-2:] != (size := (self.spec.resolution,) * 2):
            flat = F.interpolate(frames.flatten(0, 1).float(), size, mode="nearest-exact")
            frames = flat.to(frames.dtype).unflatten(0, frames.shape[:2])
        return frames

    def forward(
        self, frames: Tensor, state: Tensor | None, words: Tensor, guide: Tensor | None = None
    ) -> Float[Tensor, "b l f"]:
        """Return the outputs of the last layer."""
        features = self.features(frames, state, words)
        if self.guide is not None:
            guidance = self.normal_guide(guide, len(features))
            features = self.guide(torch.cat([features, guidance], dim=1))
        return self.head(features).unflatten(1, (self.config.network.chunk_size, -1)).float()
