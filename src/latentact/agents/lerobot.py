"""LeRobot policies as agents, with and without LAM tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Shaped

from latentact.agents.agent import STATE, TASK, AgentSpec, LatentInput, select_image, select_state
from latentact.data.decode.resize import resize
from latentact.data.latents import CODES, VALID
from latentact.errors import UserError, missing_extra
from latentact.io.atomic import read_object
from latentact.types import ActionSpace


def read_policy_config(folder: Path) -> Any:
    """Return LeRobot's configuration of a policy folder.

    Raises:
        UserError: LeRobot is not installed, or no installed package provides the policy type.
    """
    try:
        from lerobot.configs import PreTrainedConfig
        from lerobot.utils.import_utils import register_third_party_plugins
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "lerobot", "lerobot") from error
    register_third_party_plugins()
    kind = str(read_object(folder / "config.json").get("type", ""))
    if kind not in PreTrainedConfig.get_known_choices():
        raise UserError(
            f"{folder} has policy type {kind!r}, which no installed package provides. Install its "
            "LeRobot plugin."
        )
    return PreTrainedConfig.from_pretrained(folder)


class LeRobotAgent:
    """Run any LeRobot policy from its `pretrained_model` folder.

    A policy that is conditioned on LAM tokens reads them before every action: of each predicted chunk only
    the first action is executed. Without latent actions it executes `n_action_steps`, as in LeRobot.

    Args:
        folder: the checkpoint.
        device: where to run it.
        guided: whether latent actions are given.

    Raises:
        UserError: the type is unknown, the policy cannot be loaded, it needs observations that environments
            and robots here do not have, or `guided` is set and it is not conditioned on latent actions.
    """

    def __init__(self, folder: Path, device: str, *, guided: bool = False) -> None:
        config = read_policy_config(folder)
        from lerobot.policies import get_policy_class, make_pre_post_processors

        kind = config.type
        conditioned = bool(getattr(config, "use_lam_conditioning", False))
        if guided and not conditioned:
            raise UserError(
                f"{folder} ({kind}) is not conditioned on latent actions. Give a lam_diffusion or lam_act "
                "trained with use_lam_conditioning=true."
            )
        config.device = device
        if guided:
            config.n_action_steps = 1
        self._tokens_key = str(config.lam_tokens_key) if conditioned else ""
        self._shapes = {key: feature.shape for key, feature in config.image_features.items()}
        self.spec = self._agent_spec(folder, config, conditioned)
        self._policy: Any = get_policy_class(kind).from_pretrained(folder, config=config).eval().to(device)
        self._preprocess, self._postprocess = make_pre_post_processors(
            config,
            pretrained_path=str(folder),
            preprocessor_overrides={"device_processor": {"device": device}},
        )
        self._device = device

    def _agent_spec(self, folder: Path, config: Any, conditioned: bool) -> AgentSpec:
        state = config.robot_state_feature
        known = {*self._shapes, self._tokens_key, STATE}
        if conditioned:  # columns beside the tokens, which it does not read
            known |= {VALID, CODES}
        if other := sorted(set(config.input_features) - known):
            raise UserError(
                f"{folder} must have only images and {STATE} as inputs, got {', '.join(other)}. Train it "
                "without the other inputs."
            )
        latent = None
        if conditioned:
            latent = LatentInput(
                size=int(config.token_dim),
                kind="vectors" if config.lam_use_vq_tokens else "continuous",
                gap_s=float(config.lam_frame_gap_s),
                weights=str(config.lam_weights),
                optional=config.lam_dropout > 0,
            )
        return AgentSpec(
            action_space=ActionSpace(kind="continuous", size=config.action_feature.shape[0]),
            cameras=tuple(self._shapes),
            state_size=state.shape[0] if state else 0,
            fps=float(config.lam_fps) if conditioned else 0.0,
            latent=latent,
        )

    def reset(self, num_envs: int) -> None:
        """Clear the queues of observations and actions."""
        for part in (self._policy, self._preprocess, self._postprocess):
            part.reset()

    @torch.inference_mode()
    def act(
        self, observation: dict[str, Any], latent: Float32[np.ndarray, "b o f"] | None = None
    ) -> Shaped[np.ndarray, "b *a"]:
        """Return one robot action per episode, in the robot's units; see `Agent.act`."""
        batch: dict[str, Any] = {TASK: list(observation[TASK])}
        for key, shape in self._shapes.items():
            frames = torch.from_numpy(self._resized(select_image(observation, key), shape))
            batch[key] = frames.to(self._device).float().div(255).permute(0, 3, 1, 2).contiguous()
        if self.spec.state_size:
            batch[STATE] = torch.from_numpy(select_state(observation, self.spec.state_size)).to(self._device)
        if latent is not None:
            batch[self._tokens_key] = torch.from_numpy(latent[:, 0]).to(self._device)
        action = self._postprocess(self._policy.select_action(self._preprocess(batch)))
        return action.float().numpy(force=True)

    @staticmethod
    def _resized(frames: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Resize square frames `[b, h, w, 3]` to a feature's shape `[3, h, w]`; check the size of others."""
        _, height, width = shape
        if frames.shape[1:3] == (height, width):
            return frames
        if height != width or frames.shape[1] != frames.shape[2]:
            raise UserError(
                f"the camera must give images of {width}x{height} pixels, got "
                f"{frames.shape[2]}x{frames.shape[1]}. Set the camera to that size."
            )
        return resize(frames, height)
