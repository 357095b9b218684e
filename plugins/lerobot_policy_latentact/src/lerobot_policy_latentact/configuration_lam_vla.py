"""Settings of `lam_vla`: a folder of `latentact train-vla` or `latentact finetune-vla`, or a new model.

`config.json` of such a folder holds LeRobot's settings alongside latentact's own (`vla`, `spec`, `head`),
which describe the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lerobot.configs import PreTrainedConfig

from latentact.errors import UserError
from latentact.policies.lerobot_files import VLA_TYPE
from latentact.policies.vla.heads import ActionHeadConfig
from latentact.policies.vla.model import VlaConfig
from lerobot_policy_latentact.configuration_latentact import StandardConfig


@PreTrainedConfig.register_subclass(VLA_TYPE)
@dataclass
class LamVlaConfig(StandardConfig):
    """Settings of a latentact vision-language-action model."""

    vla: VlaConfig = field(default_factory=VlaConfig)
    """Settings of the model."""
    head: ActionHeadConfig | None = None
    """Settings of the action head; None: the model learns latent actions only. A head set for a model without
    one is created."""
    spec: dict[str, Any] = field(default_factory=dict)
    """Inputs and outputs; a new model takes them from the dataset."""
    latent: dict[str, Any] | None = None
    """Spec of the latent actions."""
    latent_weight: float = 0.1
    """Loss weight of latent actions relative to robot actions, if the dataset has the columns of
    `precompute`."""
    resolution: int = 0
    """Height and width of the images of a new model in pixels; 0: those of the latent actions."""
    optimizer_lr: float = 2e-5
    """Learning rate of AdamW."""
    optimizer_weight_decay: float = 0.0
    """Weight decay of AdamW."""
    optimizer_grad_clip_norm: float = 1.0
    """Maximum gradient norm."""

    def validate_features(self) -> None:
        """Validate the configuration.

        Raises:
            UserError: the model has adapters, or the data has no image.
        """
        if self.vla.lora_rank:
            raise UserError(
                f"policy.vla.lora_rank must be 0 in LeRobot, got {self.vla.lora_rank}. Train adapters with "
                "latentact train-vla or finetune-vla."
            )
        if not self.image_features:
            raise UserError("lam_vla must have an image, got a dataset without a camera. Add one.")

    @property
    def observation_delta_indices(self) -> None:
        """None: only the current observation is used."""
        return

    @property
    def action_delta_indices(self) -> list[int] | None:
        """Rows of the predicted actions, from the current one on; None: there is no action head."""
        return [*range(self.head.chunk_size)] if self.head else None
