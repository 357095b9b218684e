"""Settings of the environment type `latentact`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_IMAGE, OBS_IMAGES, OBS_STATE

from latentact.envs.distract import Distraction
from latentact.envs.spec import env_spec
from latentact.errors import UserError


@EnvConfig.register_subclass("latentact")
@dataclass
class LatentactEnv(EnvConfig):
    """A latentact environment, named as in `latentact rollout --env`."""

    task: str | None = "babyai/GoToRedBall"
    """Environment: `babyai/LEVEL`, `pusht`, or a Gymnasium id."""
    view: str = "agent"
    """"agent" or "full"; the view in which the policy's data was collected."""
    resolution: int = 0
    """Height and width of the frames in pixels; 0: the environment's own."""
    distract: str = ""
    """Distractors in the frames, such as `background=0.5,shake=0.3,correlation=0.8`."""
    max_steps: int = 0
    """Steps after which an episode ends; 0: the environment's own limit."""
    camera: str = ""
    """Key of the policy's camera, `observation.images.NAME` or `observation.image`; empty: the
    environment's own."""

    def __post_init__(self) -> None:
        """Validate the configuration and fill in the features.

        Raises:
            UserError: the environment does not exist, or a setting does not fit it.
        """
        from lerobot_env_latentact.latentact_env import make

        if not self.task:
            raise UserError("env.task must name an environment, got none. Give babyai/LEVEL or pusht.")
        spec = env_spec(self.task, view=self.view)
        self.fps, self.camera = spec.fps, self.camera or spec.camera
        if self.camera != OBS_IMAGE and not self.camera.startswith(f"{OBS_IMAGES}."):
            raise UserError(
                f"env.camera must be {OBS_IMAGE} or begin with {OBS_IMAGES}., got {self.camera!r}. Give the "
                "policy's key."
            )
        env = make(**self.gym_kwargs)
        spaces: Any = env.observation_space
        frame = spaces["pixels"] if self.camera_name is None else spaces["pixels"][self.camera_name]
        pixels = "pixels" if self.camera_name is None else f"pixels/{self.camera_name}"
        self.features = {
            ACTION: PolicyFeature(type=FeatureType.ACTION, shape=env.action_space.shape or ()),
            pixels: PolicyFeature(type=FeatureType.VISUAL, shape=frame.shape),
        }
        self.features_map = {ACTION: ACTION, pixels: self.camera}
        if spec.state_names:
            self.features["agent_pos"] = PolicyFeature(type=FeatureType.STATE, shape=(len(spec.state_names),))
            self.features_map["agent_pos"] = OBS_STATE
        env.close()

    @property
    def camera_name(self) -> str | None:
        """Camera name in LeRobot's dict of images; None for `observation.image`."""
        return None if self.camera == OBS_IMAGE else self.camera.removeprefix(f"{OBS_IMAGES}.")

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """Arguments of `lerobot_env_latentact.latentact_env.make`."""
        return {
            "task": self.task,
            "view": self.view,
            "resolution": self.resolution,
            "distract": Distraction.parse(self.distract),
            "max_steps": self.max_steps,
            "camera": self.camera_name,
        }

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, Any]]:
        """Return ``{"latentact": {0: vector environment}}``; environments idle after their episode."""
        from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
        from lerobot.envs.utils import freeze_after_episode_end

        from lerobot_env_latentact.latentact_env import make

        makers = [freeze_after_episode_end(partial(make, **self.gym_kwargs)) for _ in range(n_envs)]
        if use_async_envs and n_envs > 1:
            envs = AsyncVectorEnv(makers, context="forkserver", autoreset_mode=AutoresetMode.NEXT_STEP)
        else:
            envs = SyncVectorEnv(makers, autoreset_mode=AutoresetMode.NEXT_STEP)
        return {self.type: {0: envs}}
