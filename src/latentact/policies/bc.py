"""Behavior cloning of robot actions on labeled steps: the baseline that a latent policy must beat.

With the labels of an inverse dynamics model it learns from the pseudo-actions (VPT, arXiv 2206.11795).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from latentact.policies.contract import POLICIES
from latentact.policies.network import NetworkConfig, NetworkPolicy
from latentact.policies.spec import PolicySpec, Targets, robot_action_target
from latentact.types import ActionSpace, LatentActionSpec


@POLICIES.register("bc")
@dataclass(frozen=True, kw_only=True)
class BcConfig:
    """Settings of behavior cloning."""

    kind: str = "bc"
    """Registered name."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    """The network."""

    def targets(self, latent: LatentActionSpec | None, actions: ActionSpace | None) -> Targets:
        """Return robot actions."""
        return Targets(column="action", target=robot_action_target(actions, self.kind))

    def behavior_cloning(self) -> BcConfig:
        """Return this config."""
        return self

    def build(self, spec: PolicySpec, latent: LatentActionSpec | None = None) -> NetworkPolicy:
        """Return the module with random weights."""
        return NetworkPolicy(self, self.network, spec, latent)
