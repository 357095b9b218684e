"""Settings of `latentact`: a policy folder of `latentact train-policy` or `latentact ground`, unchanged.

`StandardConfig` holds the settings shared with `lam_vla`.

`config.json` of such a folder holds LeRobot's settings alongside latentact's own (`policy`, `spec`,
`decoder`, `latent`), which describe the network.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.optim import AdamWConfig

from latentact.errors import UserError
from latentact.policies.lerobot_files import NORMALIZATION, TYPE

if TYPE_CHECKING:
    from latentact.policies.contract import Policy
    from latentact.policies.spec import PolicySpec


@dataclass
class StandardConfig(PreTrainedConfig):
    """LeRobot settings of policies that normalize internally and train with AdamW at a constant rate."""

    push_to_hub: bool = False  # type: ignore[assignment]
    """Whether lerobot-train uploads the policy."""
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {key: NormalizationMode(mode) for key, mode in NORMALIZATION.items()}
    )
    """Identity: the policy's weights hold its statistics."""
    optimizer_lr: float = 1e-4
    """Learning rate of AdamW."""
    optimizer_weight_decay: float = 0.01
    """Weight decay of AdamW."""
    optimizer_grad_clip_norm: float = 2.0
    """Maximum gradient norm."""

    @property
    def reward_delta_indices(self) -> None:
        """None: rewards are not used."""
        return

    def get_optimizer_preset(self) -> AdamWConfig:
        """Return the optimizer of latentact's own fine-tuning."""
        return AdamWConfig(
            lr=self.optimizer_lr,
            weight_decay=self.optimizer_weight_decay,
            grad_clip_norm=self.optimizer_grad_clip_norm,
        )

    def get_scheduler_preset(self) -> None:
        """Return None: the learning rate is constant."""
        return


@PreTrainedConfig.register_subclass(TYPE)
@dataclass
class LatentactConfig(StandardConfig):
    """Settings of a latentact policy that outputs robot actions."""

    policy: dict[str, Any] = field(default_factory=dict)
    """Settings of the policy; `kind` is its registered name."""
    spec: dict[str, Any] = field(default_factory=dict)
    """Inputs and outputs of the policy."""
    decoder: dict[str, Any] | None = None
    """Settings of the decoder from latent to robot actions, of a grounded policy."""
    latent: dict[str, Any] | None = None
    """Spec of the latent actions."""

    @cached_property
    def untrained(self) -> Policy:
        """Policy with initial weights on the meta device.

        Raises:
            UserError: the settings do not describe a policy.
        """
        import torch

        with torch.device("meta"):
            return self.build()

    @property
    def policy_spec(self) -> PolicySpec:
        """Inputs and outputs of the policy."""
        return self.untrained.spec

    def build(self) -> Policy:
        """Return the policy with initial weights.

        Raises:
            UserError: the settings do not describe a policy.
        """
        from latentact.config import from_dict
        from latentact.policies.contract import POLICIES
        from latentact.policies.decoder import DecoderConfig
        from latentact.policies.spec import PolicySpec
        from latentact.types import LatentActionSpec

        self.validate_features()
        kind = POLICIES.get(str(self.policy.get("kind")))
        latent = self.latent and {**self.latent, "value_range": tuple(self.latent["value_range"])}
        policy = from_dict(kind, self.policy, "policy").build(
            from_dict(PolicySpec, self.spec, "spec"), LatentActionSpec(**latent) if latent else None
        )
        if self.decoder:
            policy.add_decoder(from_dict(DecoderConfig, self.decoder, "decoder"))
        return policy

    def validate_features(self) -> None:
        """Validate the configuration.

        Raises:
            UserError: the settings do not come from a policy folder.
        """
        if not self.policy or not self.spec:
            raise UserError(
                "policy.path must be a policy folder, got a new policy of type latentact. Train one with "
                "`latentact train-policy`, then fine-tune it with lerobot-train --policy.path=FOLDER."
            )

    @property
    def frame_indices(self) -> list[int]:
        """Rows of the observed frames, relative to the current one."""
        network, stride = self.untrained.config.network, self.policy_spec.stride
        return [row * stride for row in range(1 - network.n_obs_steps, 1)]

    @property
    def observation_delta_indices(self) -> list[int]:
        """Rows of the observed frames and, of a guided policy, of the tokens ahead."""
        guide = self.policy_spec.guide
        return sorted({*self.frame_indices, *(guide.offsets if guide else ())})

    @property
    def action_delta_indices(self) -> list[int]:
        """Rows of the predicted actions, from the current one on."""
        return [*range(self.untrained.config.network.chunk_size * self.policy_spec.stride)]
