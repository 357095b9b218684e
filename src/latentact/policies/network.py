"""The network of the built-in policies: frames, state and task words to a chunk of targets."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from latentact.errors import UserError, require_between, require_one_of
from latentact.nn.grid import CellEncoder
from latentact.nn.impala import Impala
from latentact.nn.patch import PatchEncoder
from latentact.policies.contract import Policy, PolicyConfig
from latentact.policies.spec import PolicySpec
from latentact.types import LatentActionSpec

BACKBONES = ("impala", "patch", "grid", "state")
STATE_LIMIT = 10.0
"""state: largest normalized number that the network gets."""


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Settings of the network, shared by the methods of a comparison."""

    RENAMED: ClassVar = {"frames": "n_obs_steps", "chunk": "chunk_size", "execute": "n_action_steps"}

    backbone: str = "impala"
    """impala (LAPO's policy), patch (cheap patch network), grid (embedded integer cells and an MLP) or state
    (no frames: layers of tanh on the robot state and the task's words; use_state is then true)."""
    impala_scale: int = 4
    """impala: multiplier of the channels (16, 32, 32)."""
    patch: int = 8
    """patch: side of a patch in pixels."""
    channels: tuple[int, ...] = (64, 96)
    """patch: channels; two residual blocks each."""
    halve: bool = False
    """patch: whether each further level halves the resolution."""
    keypoints: int = 0
    """patch: number of keypoints, whose positions the features include; 0: none."""
    grid_values: int = 32
    """grid: number of values of an integer."""
    hidden: tuple[int, ...] = (64, 64)
    """state: widths of the layers."""
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
        require_one_of("network.backbone", self.backbone, BACKBONES)
        require_between("network.grid_values", self.grid_values, 1, 256)
        if self.backbone == "state":
            object.__setattr__(self, "use_state", True)
            if not self.hidden or min(self.hidden) < 1:
                raise UserError(f"network.hidden must have widths of at least 1, got {[*self.hidden]}.")
        require_between("network.impala_scale", self.impala_scale, 1, 256)
        require_between("network.patch", self.patch, 1, 1 << 14)
        require_between("network.keypoints", self.keypoints, 0, 1 << 14)
        require_between("network.n_obs_steps", self.n_obs_steps, 1, 256)
        require_between("network.chunk_size", self.chunk_size, 1, 1 << 14)
        require_between(
            "network.n_action_steps (at most network.chunk_size)", self.n_action_steps, 1, self.chunk_size
        )

    @property
    def uses_frames(self) -> bool:
        """Whether the network takes frames."""
        return self.backbone != "state"


class NetworkPolicy(Policy):
    """The policy of `NetworkConfig`: an encoder of the frames or of the state alone, and linear layers.

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
        channels, width = spec.channels * network.n_obs_steps, 256
        self.grid_values = network.grid_values if network.backbone == "grid" else 0
        extra = (spec.state_size if network.use_state else 0) + len(spec.words)
        if network.backbone == "state":
            self.encoder, width = _layers(extra, network.hidden), network.hidden[-1]
        elif network.backbone == "impala":
            scaled = tuple(network.impala_scale * c for c in (16, 32, 32))
            self.encoder = Impala(channels, spec.resolution, scaled)
        elif network.backbone == "grid":
            self.encoder = CellEncoder(
                network.n_obs_steps, spec.channels, spec.resolution, network.grid_values
            )
        else:
            self.encoder = PatchEncoder(
                channels, spec.resolution, network.patch, network.channels, halve=network.halve,
                keypoints=network.keypoints,
            )  # fmt: skip
            width = self.encoder.out_features
        self.extra = nn.Linear(extra, width) if extra and network.backbone != "state" else None
        self.head = nn.Linear(width, network.chunk_size * spec.target.outputs)
        self.guide = None
        if spec.guide:
            tokens = spec.guide.size * len(spec.guide.offsets)
            self.guide = nn.Sequential(
                nn.Linear(width + tokens + 1, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
            )

    @property
    def output_layer(self) -> nn.Linear:
        """The last layer."""
        return self.head

    @property
    def augments(self) -> tuple[str, ...]:
        """Inputs that training can augment; integer grids are not images."""
        return tuple(name for name in super().augments if name != "frames" or not self.grid_values)

    def features(self, frames: Tensor, state: Tensor | None, words: Tensor) -> Float[Tensor, "b d"]:
        """Return a vector per observation: 256 numbers and 3 per keypoint, or those of state's last layer."""
        parts = [self.normal_state(state)] if self.config.network.use_state else []
        others = torch.cat([*parts, words], dim=1)
        if not self.uses_frames:
            return self.encoder(others.clamp(-STATE_LIMIT, STATE_LIMIT))
        grid = self.grid_values
        inputs = self._cells(frames, grid) if grid else self.normal_frames(frames)
        features = self.encoder(torch.cat(inputs.unbind(1), dim=1))
        return features if self.extra is None else features + self.extra(others)

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
        return self.forward_with_features(frames, state, words, guide)[0]

    def forward_with_features(
        self, frames: Tensor, state: Tensor | None, words: Tensor, guide: Tensor | None = None
    ) -> tuple[Float[Tensor, "b l f"], Float[Tensor, "b d"]]:
        """Return the outputs of the last layer, and the features."""
        features = self.features(frames, state, words)
        if self.guide is None:
            out = self.head(features)
        else:
            out = self.guided_outputs(features, self.normal_guide(guide, len(features)), state)
        return out.unflatten(1, (self.config.network.chunk_size, -1)).float(), features

    def guided_outputs(
        self, features: Float[Tensor, "b d"], guidance: Float[Tensor, "b g"], state: Tensor | None
    ) -> Float[Tensor, "b f"]:
        """Return the outputs of the last layer from features and the result of `normal_guide`."""
        assert self.guide is not None
        return self.head(self.guide(torch.cat([features, guidance], dim=1)))


def _layers(inputs: int, widths: tuple[int, ...]) -> nn.Sequential:
    """Return linear layers, each followed by tanh."""
    sizes = pairwise((inputs, *widths))
    return nn.Sequential(*(layer for a, b in sizes for layer in (nn.Linear(a, b), nn.Tanh())))
