"""Guided behavior cloning: robot actions from the observation and the LAM tokens of a demonstration.

In training the guide is the episode's own video; at test time it is any demonstration video, whose tokens say
what changes next while the observation says where things are. Hiding the guide in some samples (as in
classifier-free guidance, arXiv 2207.12598) lets one network act with and without it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from latentact.errors import UserError
from latentact.policies.contract import POLICIES, GuideSpec
from latentact.policies.network import NetworkConfig
from latentact.types import LatentActionSpec


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
    """Steps ahead whose tokens the policy sees; 0 is the transition that starts now."""
    dropout: float = 0.1
    """Share of training samples whose guide is hidden."""

    def __post_init__(self) -> None:
        """Refuse a guide that cannot be."""
        if self.tokens not in ("continuous", "vectors"):
            raise UserError(f"policy.tokens is {self.tokens!r}; wanted continuous or vectors.")
        if not self.offsets or min(self.offsets) < 0:
            raise UserError(f"policy.offsets is {list(self.offsets)}; wanted steps ahead, 0 or more.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"policy.dropout is {self.dropout}; wanted at least 0 and less than 1.")

    def guide(self, spec: LatentActionSpec) -> GuideSpec:
        """Return what of a LAM's tokens the policy sees."""
        size = spec.tokens * spec.token_dim
        return GuideSpec(offsets=self.offsets, size=size, tokens=cast(Any, self.tokens), dropout=self.dropout)
