"""An environment of latentact with the observations, actions and attributes that LeRobot reads."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from latentact.envs.checks import check_ranges, check_step_limit
from latentact.envs.distract import Distraction
from latentact.envs.spec import env_spec, make_env
from latentact.types import ActionSpace

NO_LIMIT = 100_000
"""Step limit reported to LeRobot if every episode has its own: LeRobot applies one limit to a whole batch."""


class LatentactGymEnv(gym.Wrapper):
    """Wrap an environment of `make_env` for LeRobot.

    Observations: `pixels` ``{camera: uint8 [h, w, 3]}`` (the array itself for LeRobot's single camera) and
    `agent_pos` float32 `[s]` where the environment has a state. Actions: float32 `[a]`; a discrete action is
    the environment's integer as float32 `[1]`. `info` holds `is_success` after every step where the
    environment reports it.

    Args:
        env: environment returned by `make_env`.
        actions: action space of the environment.
        camera: name of the camera; None: the single camera.
        fps: frames per second of videos.
        max_steps: steps after which an episode is truncated; 0: the environment's own limit.
    """

    def __init__(
        self, env: gym.Env, *, actions: ActionSpace, camera: str | None, fps: int, max_steps: int
    ) -> None:
        super().__init__(env)
        self._camera, self._discrete, self._limit = camera, actions.discrete, max_steps
        self._steps, self._frame = 0, np.zeros((1, 1, 3), np.uint8)
        self.task = ""
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": fps}
        spaces: Any = env.observation_space
        frame = spaces["pixels"]
        images = frame if camera is None else gym.spaces.Dict({camera: frame})
        self.observation_space = gym.spaces.Dict({**spaces.spaces, "pixels": images})
        if actions.discrete:
            values = actions.values or tuple(range(actions.size))
            self.action_space = gym.spaces.Box(min(values), max(values), (1,), np.float32)

    @property
    def task_description(self) -> str:
        """Task text of the current episode."""
        return self.task

    @property
    def render_mode(self) -> str:
        """Render mode `rgb_array`: `render` returns arrays."""
        return "rgb_array"

    @property
    def _max_episode_steps(self) -> int:
        """Step limit that LeRobot applies."""
        return self._limit or NO_LIMIT

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode; `options` is ignored."""
        observation, info = self.env.reset(seed=seed)
        self.task, self._steps = str(info["task"]), 0
        return self._adapted(observation), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Take one step."""
        taken: Any = int(np.rint(action.item())) if self._discrete else action
        observation, reward, terminated, truncated, info = self.env.step(taken)
        self._steps += 1
        truncated = truncated or (self._steps == self._limit and not terminated)
        found = {"is_success": info["is_success"]} if "is_success" in info else {}
        return self._adapted(observation), float(reward), terminated, truncated, found

    def render(self) -> np.ndarray:
        """Return the latest frame, uint8 `[h, w, 3]`."""
        return self._frame

    def _adapted(self, observation: dict[str, Any]) -> dict[str, Any]:
        self._frame = observation["pixels"]
        images = self._frame if self._camera is None else {self._camera: self._frame}
        return {**observation, "pixels": images}


def make(
    *, task: str, view: str, resolution: int, distract: Distraction, max_steps: int, camera: str | None
) -> LatentactGymEnv:
    """Return an environment for LeRobot.

    Args:
        task: name of the environment, as for `make_env`.
        view: as for `make_env`.
        resolution: as for `make_env`.
        distract: as for `make_env`.
        max_steps: steps after which an episode ends; 0: the environment's own limit.
        camera: name of the camera; None: LeRobot's single camera.

    Raises:
        UserError: a setting cannot be used.
    """
    check_ranges(max_steps=max_steps)
    spec = env_spec(task, view=view)
    check_step_limit(spec, max_steps)
    env = make_env(task, resolution=resolution, view=view, distract=distract)
    return LatentactGymEnv(env, actions=spec.action_space, camera=camera, fps=spec.fps, max_steps=max_steps)
