"""Latent behavior cloning: predicts latent actions of unlabeled video (LAPO stage 2, arXiv 2312.10812).

Needs `ground` to act. LAPO regresses the vector before the quantizer; LAPA (2410.11758) predicts codes with
cross-entropy, which can represent several modes instead of their average.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from latentact.errors import UserError
from latentact.policies.bc import BcConfig
from latentact.policies.contract import POLICIES
from latentact.policies.network import NetworkConfig, NetworkPolicy
from latentact.policies.spec import PolicySpec, Targets, latent_action_target
from latentact.types import ActionSpace, LatentActionSpec


@POLICIES.register("latent")
@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Settings of a latent policy."""

    kind: str = "latent"
    """Registered name."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    """The network."""
    target: str = "continuous"
    """continuous: the vector before the quantizer (LAPO); vectors: after it; codes: its indices, by cross-
    entropy."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        if self.target not in ("continuous", "vectors", "codes"):
            raise UserError(f"policy.target must be continuous, vectors or codes, got {self.target!r}.")

    def targets(self, latent: LatentActionSpec | None, actions: ActionSpace | None) -> Targets:
        """Return the latent actions of the labels."""
        column: Literal["continuous", "vectors", "codes"] = self.target  # type: ignore[assignment]
        return Targets(column=column, target=latent_action_target(latent, column, self.kind))

    def behavior_cloning(self) -> BcConfig:
        """Return behavior cloning with the same network."""
        return BcConfig(network=self.network)

    def build(self, spec: PolicySpec, latent: LatentActionSpec | None = None) -> NetworkPolicy:
        """Return the module with random weights."""
        return NetworkPolicy(self, self.network, spec, latent)
