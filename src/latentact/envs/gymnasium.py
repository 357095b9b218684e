"""Any Gymnasium id whose observation is an image, holds one, or that can render itself; no expert.

The frame is the observation where that is an RGB image, its entry `pixels` or `image`, or else what
`render()` draws. The state is the entry `agent_pos` or `state`, or the whole observation where that is a
vector. Success is `info["is_success"]` or `info["success"]`, where an environment gives one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from latentact.envs.adapt import adapt, import_gymnasium
from latentact.envs.spec import ENVS, EnvSpec, Expert
from latentact.errors import UserError, did_you_mean
from latentact.types import ActionSpace

if TYPE_CHECKING:
    import gymnasium as gym

FPS = 10
"""Steps per second of an environment that does not say (`metadata["render_fps"]`)."""


@ENVS.register("gymnasium")
class Gymnasium:
    """Environments registered with Gymnasium."""

    def check(self, name: str) -> None:
        """Raise a UserError where Gymnasium knows no such id."""
        gymnasium = import_gymnasium()
        try:
            gymnasium.spec(name)
        except (gymnasium.error.Error, ModuleNotFoundError) as error:
            suites = [suite for suite in ENVS.names() if suite != "gymnasium"]
            known = did_you_mean(name, suites).removesuffix(".")
            raise UserError(
                f"unknown environment {name!r}{known}, or a Gymnasium id ({_first_line(error)})."
            ) from error

    def make(self, name: str, resolution: int, view: str) -> gym.Env:
        """Return the environment.

        Raises:
            UserError: it has no image observations and cannot draw, or its action is not supported.
        """
        env, image = _make(name)
        _action_space(name, env)
        key, space = _state_space(env)

        def pixels(observation: Any) -> np.ndarray:
            if image is None:
                return np.asarray(env.render(), np.uint8)
            return observation[image] if image else observation

        return adapt(
            env,
            pixels=pixels,
            resolution=resolution,
            state=None if space is None else lambda o: np.ravel(o[key] if key else o),
            state_range=None if space is None else (np.ravel(space.low), np.ravel(space.high)),
            success=lambda reward, terminated, info: info.get("is_success", info.get("success")),
        )

    def spec(self, name: str, view: str) -> EnvSpec:
        """Return what the environment shows and takes."""
        env, _ = _make(name)
        action = _action_space(name, env)
        _, space = _state_space(env)
        fps = int(env.metadata.get("render_fps") or FPS)
        env.close()
        return EnvSpec(
            name=name,
            fps=fps,
            camera="observation.images.camera",
            action_space=action,
            action_names=tuple(f"action_{i}" for i in range(action.size)),
            state_names=()
            if space is None
            else tuple(f"state_{i}" for i in range(int(np.prod(space.shape)))),
        )

    def expert(self, name: str, env: gym.Env, seed: int) -> Expert:
        """Raise: there is none."""
        raise UserError(
            f"{name} has no scripted expert; collect from babyai/<Level> or pusht, or bring a dataset."
        )


def _make(name: str) -> tuple[gym.Env, str | None]:
    """Return the environment and its image's key ("": the observation is the image; None: draw it)."""
    gymnasium = import_gymnasium()
    env = gymnasium.make(name, disable_env_checker=True)
    if _is_image(env.observation_space):
        return env, ""
    for key in ("pixels", "image"):
        if isinstance(env.observation_space, gymnasium.spaces.Dict) and _is_image(
            env.observation_space.get(key)
        ):
            return env, key
    if "rgb_array" not in env.metadata.get("render_modes", ()):
        raise UserError(
            f"{name} gives no RGB image (its observation is {env.observation_space}) and cannot draw one; "
            "choose an environment with image observations."
        )
    env.close()
    return gymnasium.make(name, render_mode="rgb_array", disable_env_checker=True), None


def _is_image(space: Any) -> bool:
    shape = getattr(space, "shape", None)
    return (
        getattr(space, "dtype", None) == np.uint8 and shape is not None and len(shape) == 3 and shape[2] == 3
    )


def _state_space(env: gym.Env) -> tuple[str, Any]:
    """Return the key of the state ("": the observation is the state) and its space (None: there is none)."""
    gymnasium = import_gymnasium()
    space: Any = env.observation_space
    named = {"": space, **space.spaces} if isinstance(space, gymnasium.spaces.Dict) else {"": space}
    for key in ("agent_pos", "state", ""):
        found: Any = named.get(key)
        if (
            isinstance(found, gymnasium.spaces.Box)
            and found.dtype != np.uint8
            and len(found.shape or ()) == 1
        ):
            return key, found
    return "", None


def _action_space(name: str, env: gym.Env) -> ActionSpace:
    gymnasium = import_gymnasium()
    space: Any = env.action_space
    if isinstance(space, gymnasium.spaces.Discrete) and space.start == 0:
        return ActionSpace(kind="discrete", size=int(space.n))
    if isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1:
        return ActionSpace(kind="continuous", size=space.shape[0])
    raise UserError(
        f"{name} takes actions of {space}; wanted a choice that starts at 0 or a vector of numbers."
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")
