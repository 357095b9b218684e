"""PushT: push a T-shaped block to its goal with a round finger (Chi et al., 2023; package gym-pusht).

State and action are positions in the 512x512 world; the action is the finger's target for the next tenth of a
second. The task succeeds when the block covers 95 % of its goal, which terminates the episode.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from latentact.envs.adapt import adapt
from latentact.envs.spec import ENVS, EnvSpec, Expert
from latentact.errors import UserError, missing_extra
from latentact.types import ActionSpace

if TYPE_CHECKING:
    import gymnasium as gym

RESOLUTION = 96
WORLD = 512
STRIDE = 20.0
"""Typical distance per axis between the finger and its target."""


@ENVS.register("pusht")
class PushT:
    """The only environment of gym-pusht."""

    def check(self, name: str) -> None:
        """Raise a UserError for a level: PushT has none."""
        if name != "pusht":
            raise UserError(f"unknown PushT level {name.partition('/')[2]!r}. Use 'pusht'.")

    def spec(self, name: str, view: str) -> EnvSpec:
        """Return the environment's specification."""
        return EnvSpec(
            name=name,
            fps=10,
            camera="observation.images.top",
            action_space=ActionSpace(kind="continuous", size=2),
            action_names=("x", "y"),
            state_names=("x", "y"),
        )

    def make(self, name: str, resolution: int, view: str) -> gym.Env:
        """Return the environment; both views are the same image from above."""
        os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
        try:
            import gym_pusht  # noqa: F401  (registers the environment)
            import gymnasium
        except ModuleNotFoundError as error:
            raise missing_extra("gym_pusht", "envs") from error
        size = resolution or RESOLUTION
        env = gymnasium.make(
            "gym_pusht/PushT-v0",
            obs_type="pixels_agent_pos",
            observation_width=size,
            observation_height=size,
            disable_env_checker=True,
        )
        return adapt(
            env,
            name=name,
            pixels=lambda observation: observation["pixels"],
            resolution=size,
            state=lambda observation: np.clip(observation["agent_pos"], 0, WORLD),
            state_range=(np.zeros(2), np.full(2, WORLD)),
            task=lambda: "push the T-shaped block onto its place",
            success=lambda reward, terminated, info: info["is_success"],
            floor=_floor,
            heading=lambda action: (action - np.array(env.unwrapped.agent.position)) / STRIDE,  # type: ignore[attr-defined]
        )

    def expert(self, name: str, env: gym.Env, seed: int) -> Expert:
        """Return the planner of `envs.experts.pusht`."""
        from latentact.envs.experts.pusht import PushPlanner

        return PushPlanner(env, seed)


def _floor(frame: np.ndarray) -> np.ndarray:
    """Return the opacity of the white floor; antialiased edges of objects are between 0 and 1."""
    return ((frame.min(-1) - 200.0) / 55).clip(0, 1).astype(np.float32)
