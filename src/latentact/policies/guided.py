"""Guided behavior cloning: robot actions from the observation and the LAM tokens of a demonstration.

In training the guide is the episode's own video; at test time it is any demonstration video. The tokens give
the next change, the observation the current scene. Hiding the guide in some samples (as in classifier-free
guidance, arXiv 2207.12598) lets one network act with and without it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from latentact.errors import UserError
from latentact.policies.bc import BcConfig
from latentact.policies.contract import POLICIES
from latentact.policies.network import NetworkConfig, NetworkPolicy
from latentact.policies.spec import GuideSpec, PolicySpec, Targets, robot_action_target
from latentact.types import ActionSpace, LatentActionSpec


@POLICIES.register("guided")
@dataclass(frozen=True, kw_only=True)
class GuidedConfig:
    """Settings of a guided policy."""

    kind: str = "guided"
    """Registered name."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    """The network."""
    tokens: str = "continuous"
    """continuous: the vector before the quantizer; vectors: after it."""
    offsets: tuple[int, ...] = (0, 1, 2, 4)
    """Steps ahead whose tokens the policy is conditioned on; 0 is the transition that starts now."""
    dropout: float = 0.1
    """Fraction of training samples whose guide is hidden."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        if self.tokens not in ("continuous", "vectors"):
            raise UserError(f"policy.tokens must be continuous or vectors, got {self.tokens!r}.")
        if not self.offsets or min(self.offsets) < 0:
            raise UserError(f"policy.offsets must be at least 0, got {list(self.offsets)}.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"policy.dropout must be at least 0 and less than 1, got {self.dropout}.")

    def targets(self, latent: LatentActionSpec | None, actions: ActionSpace | None) -> Targets:
        """Return robot actions, guided by the latent actions of the labels."""
        if latent is None:
            raise UserError(f"policy={self.kind} needs latent actions, got no labels. Give labels=DIR.")
        tokens: Literal["continuous", "vectors"] = self.tokens  # type: ignore[assignment]
        guide = GuideSpec(
            offsets=self.offsets,
            size=latent.tokens * latent.token_dim,
            tokens=tokens,
            dropout=self.dropout,
        )
        return Targets(column="action", target=robot_action_target(actions, self.kind), guide=guide)

    def behavior_cloning(self) -> BcConfig:
        """Return behavior cloning with the same network."""
        return BcConfig(network=self.network)

    def build(self, spec: PolicySpec, latent: LatentActionSpec | None = None) -> NetworkPolicy:
        """Return the module with random weights."""
        return NetworkPolicy(self, self.network, spec, latent)
