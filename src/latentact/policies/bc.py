"""Behavior cloning of robot actions on labeled steps: the baseline that a latent policy must beat."""

from __future__ import annotations

from dataclasses import dataclass, field

from latentact.policies.contract import POLICIES
from latentact.policies.network import NetworkConfig


@POLICIES.register("bc")
@dataclass(frozen=True, kw_only=True)
class BcConfig:
    """Settings of behavior cloning."""

    kind: str = "bc"
    """Registered name."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    """The network."""
