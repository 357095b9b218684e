"""Supervised inverse dynamics, the VPT baseline (arXiv 2206.11795): frames to robot actions.

Learns from labeled steps. Its latent actions *are* robot actions, so its labels are pseudo-actions for
behavior cloning: the baseline for every latent action model with the same labels. It has no forward dynamics.
Timesteps are images, or robot states.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Shaped, UInt8
from torch import Tensor, nn

from latentact.errors import UserError, require_between, require_one_of
from latentact.lams.contract import (
    LAMS,
    LatentActionModel,
    action_loss,
    at_steps,
    batched,
    normalize_frames,
    require_states,
    window_steps,
)
from latentact.nn.grid import CellEncoder
from latentact.nn.impala import Impala
from latentact.nn.mlp import mlp
from latentact.nn.patch import PatchEncoder
from latentact.types import ActionSpace, Clip, LatentActions

BACKBONES = ("impala", "patch", "cells", "state")


@LAMS.register("idm")
@dataclass(frozen=True, kw_only=True)
class IdmConfig:
    """Settings of supervised inverse dynamics; needs labeled episodes."""

    kind: str = "idm"
    """Registered name."""
    backbone: str = "impala"
    """impala, patch or cells, as in LAPO; state: an MLP on robot states."""
    size: int = 64
    """Height and width to which frames are resized, in pixels (cells: cells)."""
    grid_values: int = 32
    """cells: number of values of an integer."""
    scale: int = 4
    """impala: multiplier of the channels (16, 32, 32)."""
    patch: int = 8
    """patch: side of a patch in pixels."""
    channels: tuple[int, ...] = (64,)
    """patch: channels of the levels; each further level halves the resolution."""
    difference_input: float = 0.0
    """Scale of the difference (next - current) as extra input channels; 0: none."""
    state_size: int = 0
    """state: size of the robot state."""
    hidden: int = 256
    """state: width of the two hidden layers."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        require_one_of("lam.backbone", self.backbone, BACKBONES)
        if self.backbone in ("cells", "state") and self.difference_input:
            raise UserError(
                f"lam.difference_input must be 0 for {self.backbone}, got {self.difference_input:g}."
            )
        if (self.backbone == "state") != bool(self.state_size):
            raise UserError(
                f"lam.state_size must be the size of the data's robot state for state, and 0 for other "
                f"backbones, got {self.state_size} for {self.backbone}."
            )
        require_between("lam.state_size", self.state_size, 0, 1 << 14)
        require_between("lam.hidden", self.hidden, 1, 1 << 16)

    def with_action_head(self, weight: float) -> None:
        """Return None: its latent actions are the robot actions themselves."""

    def build(self, actions: ActionSpace | None = None) -> Idm:
        """Return the model with random weights."""
        if actions is None:
            raise UserError("lam=idm needs data with robot actions, got none. Use lam=lapo.")
        return Idm(self, actions)


class Idm(LatentActionModel):
    """Predict the robot action between the last two of three timesteps."""

    context = 1
    generative = False
    mean: Tensor
    std: Tensor

    def __init__(self, config: IdmConfig, actions: ActionSpace) -> None:
        super().__init__(config)
        self.actions, self.space = actions, actions
        self.state_size = config.state_size
        self.augments = () if config.backbone in ("cells", "state") else ("frames",)
        channels = 12 if config.difference_input else 9
        if config.backbone == "state":
            self.state_norm = nn.BatchNorm1d(config.state_size, affine=False)
            hidden = (config.hidden, config.hidden)
            self.encoder = nn.Sequential(mlp(3 * config.state_size, hidden, 256), nn.ReLU())
        elif config.backbone == "cells":
            self.encoder = CellEncoder(3, 3, config.size, config.grid_values)
        elif config.backbone == "impala":
            self.encoder = Impala(channels, config.size, tuple(config.scale * c for c in (16, 32, 32)))
        else:
            self.encoder = PatchEncoder(channels, config.size, config.patch, config.channels)
        self.head = nn.Linear(256, actions.size)
        action_dim = 0 if actions.discrete else actions.size
        self.register_buffer("mean", torch.zeros(action_dim))
        self.register_buffer("std", torch.ones(action_dim))
        self.spec = self._new_spec(
            config.size,
            tokens=1,
            token_dim=actions.size,
            codebook_size=actions.size if actions.discrete else None,
            robot_actions=True,
        )

    def set_action_stats(self, actions: Shaped[Tensor, "n *a"]) -> None:
        """Set mean and standard deviation of continuous actions from the labeled steps."""
        if not self.space.discrete:
            self.mean.copy_(actions.mean(0))
            self.std.copy_(actions.std(0).clamp(min=1e-4))

    def encode(
        self,
        frames: UInt8[Tensor, "*b t c h w"],
        valid: Bool[Tensor, "*b t"] | None = None,
        last: bool = False,
        states: Float32[Tensor, "*b t s"] | None = None,
    ) -> LatentActions:
        """Return robot actions: class probabilities and classes, or values in the robot's units."""
        frames, valid = batched(frames, valid, last)
        steps, transition_valid = window_steps(valid, self.context, last)
        out = self._scores(at_steps(self._observed(frames, states), steps))
        vectors = out.softmax(1) if self.space.discrete else out * self.std + self.mean
        vectors = vectors.reshape(*transition_valid.shape, 1, self.spec.token_dim)
        codes = vectors.argmax(-1) if self.space.discrete else None
        return LatentActions(vectors=vectors, continuous=vectors, codes=codes, valid=transition_valid)

    def codebook(self) -> Float[Tensor, "k m f"] | None:
        """Return one unit vector per class; None for continuous actions."""
        size = self.spec.codebook_size
        return None if size is None else torch.eye(size)[None]

    def predict(
        self, frames: UInt8[Tensor, "b t c h w"], vectors: Float[Tensor, "b k d"]
    ) -> UInt8[Tensor, "b c h2 w2"]:
        """Raise a UserError: there is no forward dynamics."""
        raise UserError("lam=idm has no forward dynamics and predicts no frames. Use lam=lapo.")

    def loss(self, clip: Clip) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss over labeled steps."""
        assert clip.action is not None
        assert clip.labeled is not None
        action = clip.action if self.space.discrete else (clip.action - self.mean) / self.std
        windows = self._observed(clip.idm_frames, clip.states)[:, -3:]
        return action_loss(self._scores(windows), action, clip.labeled), {}

    def _observed(self, frames: Tensor, states: Tensor | None) -> Tensor:
        """Return the robot states, or the frames where it uses none."""
        found = require_states(self, states)
        return frames if found is None else found

    def _scores(self, windows: Tensor) -> Tensor:
        if self.config.backbone == "state":
            states = self.state_norm(windows.float().flatten(0, 1)).unflatten(0, windows.shape[:2])
            return self.head(self.encoder(states.flatten(1))).float()
        if self.config.backbone == "cells":
            return self.head(self.encoder(windows.flatten(1, 2))).float()
        x = normalize_frames(windows, self.config.size)
        frames = [*x.unbind(1)]
        if gain := self.config.difference_input:
            frames.append((x[:, -1] - x[:, -2]) * gain)
        return self.head(self.encoder(torch.cat(frames, dim=1))).float()
