"""LeRobot policies that are conditioned on LAM tokens, as agents."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from latentact.agents.agent import STATE, _state, picture
from latentact.data.decode.resize import resize
from latentact.errors import UserError, missing_extra
from latentact.io.atomic import read_json
from latentact.types import ActionSpace, LatentActionSpec


class LeRobotPolicyAdapter:
    """A LeRobot policy that is conditioned on LAM tokens, from its `pretrained_model` folder.

    It looks at its guide before every action: of each predicted chunk only the first action is taken.

    Args:
        folder: the checkpoint.
        device: where to run it.

    Raises:
        UserError: it is of an unknown type, cannot be loaded, or is not conditioned on tokens.
    """

    latent: LatentActionSpec | None = None
    offsets: tuple[int, ...] = (0,)
    stride = 1

    def __init__(self, folder: Path, device: str) -> None:
        try:
            from lerobot.configs import PreTrainedConfig
            from lerobot.policies import get_policy_class, make_pre_post_processors
            from lerobot.utils.import_utils import register_third_party_plugins
        except ModuleNotFoundError as error:
            raise missing_extra(error.name or "lerobot", "lerobot") from error
        register_third_party_plugins()
        kind = str(read_json(folder / "config.json")["type"])
        if kind not in PreTrainedConfig.get_known_choices():
            raise UserError(
                f"{folder} is a policy of type {kind!r}, which no installed package knows; "
                "install its LeRobot plugin."
            )
        config: Any = PreTrainedConfig.from_pretrained(folder)
        if not getattr(config, "use_lam_conditioning", False):
            raise UserError(
                f"{folder} is a {kind} that acts by what it sees alone; give a lam_diffusion or lam_act "
                "trained with use_lam_conditioning=true."
            )
        config.device = device
        config.n_action_steps = 1  # a chunk would be acted out blind to what the guide says next
        self._policy: Any = get_policy_class(kind).from_pretrained(folder, config=config).eval().to(device)
        overrides = {"device_processor": {"device": device}}
        self._before, self._after = make_pre_post_processors(
            config, pretrained_path=str(folder), preprocessor_overrides=overrides
        )
        self._device, self._key = device, str(config.lam_tokens_key)
        self.tokens = "vectors" if config.lam_use_vq_tokens else "continuous"
        self.lam_weights, self.token_size = str(config.lam_weights), int(config.token_dim)
        self.gap_s, self.fps = float(config.lam_frame_gap_s), float(config.lam_fps)
        self.without_guide = config.lam_dropout > 0
        self._shapes = {key: f.shape for key, f in config.image_features.items()}
        self.cameras = tuple(self._shapes)
        state = config.robot_state_feature
        self.state_size = state.shape[0] if state else 0
        self.actions = ActionSpace(kind="continuous", size=config.action_feature.shape[0])

    def reset(self) -> None:
        """Forget the observations and the actions still to be taken."""
        for part in (self._policy, self._before, self._after):
            part.reset()

    def prepare(
        self, observation: dict[str, Any], latent_action: Float32[Tensor, "o f"] | None
    ) -> dict[str, Any]:
        """Return the preprocessed batch of one, with the tokens in it."""
        from lerobot.policies.utils import prepare_observation_for_inference

        seen = {key: self._sized(picture(observation, key), shape) for key, shape in self._shapes.items()}
        if self.state_size:
            seen[STATE] = _state(observation, self.state_size)
        if latent_action is not None:
            seen[self._key] = latent_action[0].numpy(force=True)
        device, task = torch.device(self._device), str(observation.get("task", ""))
        return cast("dict[str, Any]", self._before(prepare_observation_for_inference(seen, device, task)))

    def _sized(self, frame: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        _, height, width = shape
        if frame.shape[:2] == (height, width):
            return frame
        if height != width or frame.shape[0] != frame.shape[1]:
            raise UserError(
                f"the policy looks at pictures of {width}x{height} pixels and the camera gives "
                f"{frame.shape[1]}x{frame.shape[0]}; set the camera to that size."
            )
        return resize(frame[None], height)[0]

    @torch.inference_mode()
    def act(self, batch: dict[str, Any]) -> np.ndarray:
        """Return the action in the robot's units."""
        return np.asarray(self._after(self._policy.select_action(batch))[0].float().numpy(force=True))
