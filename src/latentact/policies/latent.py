"""Latent behavior cloning: predicts latent actions of unlabeled video (LAPO stage 2, arXiv 2312.10812).

Needs `ground` to act. LAPO regresses the vector before the quantizer; predicting codes by cross-entropy is
LAPA's way (2410.11758) and keeps apart what an average would blur.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from latentact.errors import UserError
from latentact.policies.contract import POLICIES, Target
from latentact.policies.network import NetworkConfig
from latentact.types import LatentActionSpec


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
        """Refuse unknown targets."""
        if self.target not in ("continuous", "vectors", "codes"):
            raise UserError(f"policy.target is {self.target!r}; wanted continuous, vectors or codes.")

    def latent_target(self, spec: LatentActionSpec) -> Target:
        """Return what the network predicts for latent actions of a LAM."""
        if self.target != "codes":
            return Target(kind="numbers", size=spec.tokens * spec.token_dim)
        if spec.codebook_size is None:
            raise UserError(
                f"policy.target is codes but the labels of {spec.model} have none; use policy.target=vectors."
            )
        return Target(kind="classes", size=spec.codebook_size, groups=spec.tokens)
