"""Guided behavior cloning: robot actions from the observation and the LAM tokens of a demonstration.

In training the guide is the episode's own video; at test time it is any demonstration video. The tokens give
the next change, the observation the current scene. Hiding the guide in some samples (as in classifier-free
guidance, arXiv 2207.12598) lets one network act with and without it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from latentact.data.samples import PolicyBatch
from latentact.errors import UserError
from latentact.policies.bc import BcConfig
from latentact.policies.contract import POLICIES
from latentact.policies.network import NetworkConfig, NetworkPolicy
from latentact.policies.spec import GuideSpec, PolicySpec, Targets, robot_action_target
from latentact.types import ActionSpace, LatentActionSpec

_RIDGE = 1e-8
"""Regularization of the least squares, relative to the number of samples."""
_SAMPLES = 4096
"""Samples for the least squares."""
_FIRST = 0.01
"""Scale of the first weights of the network's output beside the linear map."""


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
    """Steps ahead whose tokens the policy is conditioned on; 0 is the transition that starts now, -1 the one
    that ends now."""
    dropout: float = 0.1
    """Fraction of training samples whose guide is hidden."""
    linear: bool = False
    """Whether the network adds to a linear map of the tokens and, if it takes it, of the state. The map is
    fitted by least squares before training: for continuous actions that the tokens nearly determine."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        if self.tokens not in ("continuous", "vectors"):
            raise UserError(f"policy.tokens must be continuous or vectors, got {self.tokens!r}.")
        if max(self.offsets, default=-1) < 0:
            raise UserError(f"policy.offsets must have an offset of at least 0, got {list(self.offsets)}.")
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
        target = robot_action_target(actions, self.kind)
        if self.linear and target.kind != "continuous":
            raise UserError("policy.linear must be false for discrete actions, got true. Leave it out.")
        return Targets(column="action", target=target, guide=guide)

    def behavior_cloning(self) -> BcConfig:
        """Return behavior cloning with the same network."""
        return BcConfig(network=self.network)

    def build(self, spec: PolicySpec, latent: LatentActionSpec | None = None) -> NetworkPolicy:
        """Return the module with random weights."""
        return GuidedPolicy(self, self.network, spec, latent)


class GuidedPolicy(NetworkPolicy):
    """The network, and with `config.linear` a linear map from tokens and state, to whose output it adds.

    Args:
        config: settings of the policy.
        network: settings of its network.
        spec: inputs and outputs of the policy.
        latent: spec of the latent actions.
    """

    def __init__(
        self,
        config: GuidedConfig,
        network: NetworkConfig,
        spec: PolicySpec,
        latent: LatentActionSpec | None = None,
    ) -> None:
        super().__init__(config, network, spec, latent)
        linear = None
        if config.linear:
            assert spec.guide is not None
            outputs, width = self.head.weight.shape
            inputs = spec.guide.size * len(spec.guide.offsets) + 1 + spec.state_size * network.use_state
            linear = torch.zeros(outputs, inputs)
            self.head = nn.Linear(width + outputs, outputs)
            with torch.no_grad():  # training starts near the map
                self.head.weight.mul_(_FIRST)
                self.head.weight[:, width:].copy_(torch.eye(outputs))
        self.linear: Tensor | None
        self.register_buffer("linear", linear)

    @property
    def initialized_by(self) -> int:
        """Number of samples for the linear map."""
        return 0 if self.linear is None else _SAMPLES

    def initialize(self, batch: PolicyBatch) -> None:
        """Fit the linear map to samples by least squares.

        Raises:
            UserError: none of them has a guide and all targets of a chunk.
        """
        assert self.linear is not None
        x = self._linear_inputs(self.normal_guide(batch.guide, len(batch.target)), batch.state)
        known = batch.mask.all(1) & (x[:, -1] > 0)
        if not known.any():
            raise UserError(
                "policy.linear needs samples with a guide and all targets of a chunk, got none. Use a "
                "smaller policy.network.chunk_size, or policy.linear=false."
            )
        x, y = x[known].double(), self.normal_target(batch.target).flatten(1)[known].double()
        ridge = _RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
        self.linear.copy_(torch.linalg.solve(x.T @ x + ridge, x.T @ y).T)

    def guided_outputs(
        self, features: Float[Tensor, "b d"], guidance: Float[Tensor, "b g"], state: Tensor | None
    ) -> Float[Tensor, "b f"]:
        """Return the outputs of the last layer from features, tokens and state."""
        if self.linear is None:
            return super().guided_outputs(features, guidance, state)
        assert self.guide is not None
        hidden = self.guide(torch.cat([features, guidance], dim=1))
        return self.head(
            torch.cat([hidden, F.linear(self._linear_inputs(guidance, state), self.linear)], dim=1)
        )

    def _linear_inputs(self, guidance: Tensor, state: Tensor | None) -> Float[Tensor, "b i"]:
        """Return the state, tokens and 1, or zeros without a guide."""
        own = [self.normal_state(state) * guidance[:, -1:]] if self.config.network.use_state else []
        return torch.cat([*own, guidance], dim=1)
