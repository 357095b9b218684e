"""Settings of `lam_vla`: a folder of `latentact finetune-vla`, as it is.

`config.json` of such a folder holds LeRobot's settings beside latentact's own (`vla`, `spec`, `head`), which
say what the model is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.optim import AdamWConfig

from latentact.errors import UserError
from latentact.policies.lerobot_files import NORMALIZATION, VLA_TYPE


@PreTrainedConfig.register_subclass(VLA_TYPE)
@dataclass
class LamVlaConfig(PreTrainedConfig):
    """Settings of a vision-language-action model of latentact that outputs robot actions."""

    push_to_hub: bool = False  # type: ignore[assignment]
    """Whether lerobot-train uploads the policy."""
    vla: dict[str, Any] = field(default_factory=dict)
    """Settings of the model."""
    spec: dict[str, Any] = field(default_factory=dict)
    """Its inputs and outputs."""
    head: dict[str, Any] = field(default_factory=dict)
    """Settings of its action head."""
    latent: dict[str, Any] | None = None
    """Meaning of its latent actions."""
    latent_weight: float = 0.1
    """Weight of the loss of latent actions, where the dataset has the columns that `precompute` writes."""
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {key: NormalizationMode(mode) for key, mode in NORMALIZATION.items()}
    )
    """Identity: the weights hold the statistics."""
    optimizer_lr: float = 2e-5
    """Learning rate of AdamW."""
    optimizer_weight_decay: float = 0.0
    """Weight decay of AdamW."""
    optimizer_grad_clip_norm: float = 1.0
    """Largest gradient norm."""

    def validate_features(self) -> None:
        """Validate the configuration.

        Raises:
            UserError: it does not come from a folder of finetune-vla.
        """
        if not (self.vla and self.spec and self.head):
            raise UserError(
                "policy.path must be a folder of `latentact finetune-vla`, got a new policy of type lam_vla. "
                "Train one with `latentact train-vla` and `latentact finetune-vla` first."
            )

    @property
    def observation_delta_indices(self) -> None:
        """None: only the current observation is used."""
        return

    @property
    def action_delta_indices(self) -> list[int]:
        """Rows of the predicted actions, from the current one on."""
        return [*range(self.head.get("chunk_size", 1))]

    @property
    def reward_delta_indices(self) -> None:
        """None: rewards are not used."""
        return

    def get_optimizer_preset(self) -> AdamWConfig:
        """Return the optimizer of `finetune-vla`."""
        return AdamWConfig(
            lr=self.optimizer_lr,
            weight_decay=self.optimizer_weight_decay,
            grad_clip_norm=self.optimizer_grad_clip_norm,
        )

    def get_scheduler_preset(self) -> None:
        """Return None: the learning rate is constant."""
        return
