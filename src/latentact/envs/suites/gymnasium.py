"""Any Gymnasium id whose observation is an image, holds one, or that can render itself; experts in `EXPERTS`.

The frame is the observation's only image, or of several the entry `pixels` or `image`, or else the output of
`render()`. The state is the entry `agent_pos` or `state`, or the whole observation if it is a vector. Success
is `is_success` or `success` in `info` or `info["final_info"]`, if the environment reports it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from latentact.envs.adapt import adapt
from latentact.envs.boundary import close, env_errors, import_gymnasium, to_bool
from latentact.envs.distract import directions
from latentact.envs.frames import is_image, to_rgb
from latentact.envs.spec import ENVS, EXPERTS, EnvSpec, Expert
from latentact.errors import UserError, did_you_mean
from latentact.types import ActionSpace

if TYPE_CHECKING:
    import gymnasium as gym

FPS = 10
"""Steps per second of an environment without `metadata["render_fps"]`."""


@ENVS.register("gymnasium")
class Gymnasium:
    """Environments registered with Gymnasium."""

    def check(self, name: str) -> None:
        """Import the package of an id and raise a UserError if Gymnasium has no such id."""
        gymnasium = import_gymnasium()
        with env_errors(name, "to be imported"):
            try:
                gymnasium.spec(_registered(name))
            except (gymnasium.error.Error, ModuleNotFoundError) as error:
                suites = [suite for suite in ENVS.names() if suite != "gymnasium"]
                known = did_you_mean(name, suites).removesuffix(".")
                reason = str(error).splitlines()[0].rstrip(".")
                why = "" if "did you mean" in known else f" ({reason})"
                raise UserError(f"unknown environment {name!r}{known}, or a Gymnasium id{why}.") from error

    def make(self, name: str, resolution: int, view: str) -> gym.Env:
        """Return the environment.

        Raises:
            UserError: it has neither image observations nor `render()`, or its action is not supported.
        """
        env, image = _make(name)
        with env_errors(name, "to be made"):
            _action_space(name, env)
            key, space = _state_space(env)

        def pixels(observation: Any) -> np.ndarray:
            if image is None:
                return to_rgb(env.render(), f"render() of {name}")
            space: Any = env.observation_space
            for part in image:
                observation, space = observation[part], space[part]
            return to_rgb(observation, f"the image observation of {name}", float(np.max(space.high)))

        return adapt(
            env,
            name=name,
            pixels=pixels,
            resolution=resolution,
            state=None if space is None else lambda o: np.ravel(o[key] if key else o),
            state_range=None if space is None else (np.ravel(space.low), np.ravel(space.high)),
            success=lambda reward, terminated, info: _success(name, info),
            heading=lambda action: _heading(env.action_space, action),
        )

    def spec(self, name: str, view: str) -> EnvSpec:
        """Return the environment's specification."""
        env, _ = _make(name)
        with env_errors(name, "to be made"):
            action = _action_space(name, env)
            _, space = _state_space(env)
            fps = (env.metadata or {}).get("render_fps")
        close(env, name)
        numbers = range(0 if space is None else int(np.prod(space.shape)))
        return EnvSpec(
            name=name,
            fps=int(fps) if isinstance(fps, int | float | np.number) and 1 <= fps < 10_000 else FPS,
            camera="observation.images.camera",
            action_space=action,
            action_names=tuple(f"action_{i}" for i in action.values or range(action.size)),
            state_names=tuple(f"state_{i}" for i in numbers),
            time_limit=import_gymnasium().spec(_registered(name)).max_episode_steps is not None,
        )

    def expert(self, name: str, env: gym.Env, seed: int) -> Expert:
        """Return the expert that is registered for the id.

        Raises:
            UserError: there is none.
        """
        if name in EXPERTS.names():
            return EXPERTS.get(name)(env, seed)
        suites = ", ".join(suite for suite in ENVS.names() if suite != "gymnasium")
        raise UserError(
            f"{name} must have a scripted expert for demonstrations, got none. Choose an environment of "
            f"{suites}, {', '.join(EXPERTS.names())}, register an expert, or use a dataset."
        )


def _registered(name: str) -> str:
    """Import the package of `PACKAGE:ID` or `PACKAGE/NAME` and return the id.

    Raises:
        ModuleNotFoundError: PACKAGE of `PACKAGE:ID` does not exist.
    """
    module, colon, registered = name.rpartition(":")
    if colon:
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"No package {module!r}")
        importlib.import_module(module)
        return registered
    package = name.partition("/")[0]
    known = name in import_gymnasium().registry or "/" not in name
    if not known and package.isidentifier() and importlib.util.find_spec(package):
        importlib.import_module(package)
    return name


def _make(name: str) -> tuple[gym.Env, tuple[str, ...] | None]:
    """Return the environment and its image's keys ((): the observation is the image; None: render it)."""
    gymnasium = import_gymnasium()
    with env_errors(name, "to be made"):
        env = gymnasium.make(name, disable_env_checker=True)
        image = _image(name, env.observation_space)
        if image is not None:
            return env, image
        modes = (env.metadata or {}).get("render_modes") or ()
        mode = next((mode for mode in ("rgb_array", "rgb_array_list") if mode in modes), None)
        close(env, name)
        if mode is None:
            raise UserError(
                f"{name} must have image observations or an rgb_array render mode, got the observation "
                f"{env.observation_space}. Choose another environment."
            )
        return gymnasium.make(name, render_mode=mode, disable_env_checker=True), None


def _image(name: str, space: Any) -> tuple[str, ...] | None:
    """Return the keys of the only image in an observation; None if there is none."""
    found = [keys for keys, leaf in _leaves(space) if is_image(leaf)]
    chosen = [keys for keys in (("pixels",), ("image",)) if keys in found] or found
    if len(found) > 1 and chosen is found:
        raise UserError(
            f"{name} must have one camera, got {', '.join('.'.join(keys) for keys in found)}. Register a "
            "version of it whose observation holds one image, or names the one to use 'pixels'."
        )
    return chosen[0] if chosen else None


def _leaves(space: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(space, import_gymnasium().spaces.Dict):
        for key, part in space.spaces.items():
            yield from _leaves(part, (*keys, key))
    else:
        yield keys, space


def _state_space(env: gym.Env) -> tuple[str, Any]:
    """Return the key of the state ("": the observation itself) and its space (None: no state)."""
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
    if isinstance(space, gymnasium.spaces.Discrete):
        start, size = int(space.start), int(space.n)
        values = tuple(range(start, start + size)) if start else ()
        return ActionSpace(kind="discrete", size=size, values=values)
    if isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1:
        return ActionSpace(kind="continuous", size=space.shape[0])
    raise UserError(
        f"the action of {name} must be a Discrete or a one-dimensional Box, got {space}. Choose another "
        "environment, or register a version of it with such an action."
    )


def _heading(space: Any, action: Any) -> np.ndarray:
    """Return the direction `[2]` of an action for distractors: of its class, or its first two numbers."""
    if isinstance(space, import_gymnasium().spaces.Discrete):
        return directions(int(space.n))[int(action) - int(space.start)]
    low, high = (np.asarray(bound[:2], np.float64) for bound in (space.low, space.high))
    bounded = np.isfinite(low) & np.isfinite(high) & (low < high)
    middle, half = np.where(bounded, (low + high) / 2, 0), np.where(bounded, (high - low) / 2, 1)
    return np.append((action[:2] - middle) / half, [0.0, 0.0])[:2]


def _success(name: str, info: dict[str, Any]) -> bool | None:
    """Return whether the task is done; None where the environment does not report it.

    Raises:
        EnvError: it reports something else than a boolean or the number 0 or 1.
    """
    for source in (info, info.get("final_info")):
        for key in ("is_success", "success"):
            if isinstance(source, dict) and source.get(key) is not None:
                return to_bool(source[key], f"{name}: info[{key!r}]")
    return None
