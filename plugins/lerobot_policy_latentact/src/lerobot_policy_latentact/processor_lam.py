"""Processors of `lam_diffusion` and `lam_act`: LeRobot's own steps, and one that prepares the LAM's inputs.

Tokens are not normalized here, whatever LeRobot's normalization of states (the projection holds their mean
and standard deviation), and the LAM gets the camera's raw pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lerobot.processor import ObservationProcessorStep, ProcessorStepRegistry
from lerobot.processor.factory import make_default_policy_processor_steps, make_policy_processor_pipelines
from lerobot.utils.constants import OBS_STATE

from lerobot_policy_latentact.configuration_lam import LAM_FRAMES, LAM_STATES, LamPolicyConfig


@ProcessorStepRegistry.register("latentact_lam_inputs")
@dataclass
class LamInputsStep(ObservationProcessorStep):
    """Add a batch dimension to a guide's tokens and keep raw frames for the LAM."""

    tokens_key: str
    """Key of the tokens."""
    camera: str = ""
    """Camera whose frames are kept as uint8; empty: none."""
    state: str = ""
    """Key of the robot state that is kept unnormalized; empty: none."""

    def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        """Return the observation with the LAM's inputs added."""
        found = dict(observation)
        if self.tokens_key in found:
            tokens = torch.as_tensor(found[self.tokens_key])
            found[self.tokens_key] = tokens[None] if tokens.ndim == 1 else tokens
        if self.camera and self.camera in found:
            frames = found[self.camera]
            if frames.is_floating_point():
                frames = frames.mul(255).round().clamp(0, 255).to(torch.uint8)
            found[LAM_FRAMES] = frames
        if self.state and self.state in found:
            found[LAM_STATES] = found[self.state]
        return found

    def get_config(self) -> dict[str, Any]:
        """Return the settings that a checkpoint stores."""
        return {"tokens_key": self.tokens_key, "camera": self.camera, "state": self.state}

    def transform_features(self, features: Any) -> Any:
        """Return the features; the step adds none that a dataset could hold."""
        return features


def make_lam_pre_post_processors(
    config: Any, dataset_stats: dict[str, dict[str, torch.Tensor]] | None = None
) -> tuple[Any, Any]:
    """Return the pre- and post-processor pipelines."""
    steps = make_default_policy_processor_steps(config, dataset_stats)
    steps.normalize.normalize_observation_keys = _normalized(config)
    uses_state = config.lam_on_the_fly and config.lam.state_size > 0
    before: list[Any] = [
        steps.rename_observations,
        steps.add_batch_dim,
        LamInputsStep(
            config.lam_tokens_key,
            camera=config.lam_camera if config.lam_on_the_fly else "",
            state=OBS_STATE if uses_state else "",
        ),
        steps.to_device,
        steps.normalize,
    ]
    return make_policy_processor_pipelines(before, [steps.unnormalize, steps.to_cpu])


make_lam_diffusion_pre_post_processors = make_lam_pre_post_processors
make_lam_act_pre_post_processors = make_lam_pre_post_processors


def _normalized(config: LamPolicyConfig) -> set[str]:
    """Return the inputs to normalize: all but the LAM's, of which some are flags and indices."""
    lam = (config.lam_tokens_key, "observation.lam_")
    return {key for key in config.input_features or {} if not key.startswith(lam)}
