"""The one wrapper of every environment: maps its observation to `{"pixels", "agent_pos"}`.

A discrete action must be one of the environment's integers; a continuous one must have its shape and be
finite, and is clipped to its bounds. Exceptions and invalid return values become an `EnvError`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from PIL import Image

from latentact.envs.boundary import close, env_errors, to_bool
from latentact.envs.distract import Distraction, Distractor
from latentact.envs.spec import EnvError
from latentact.errors import UserError

log = logging.getLogger(__name__)


class Adapter(gym.Wrapper):
    """Environment with the observations and actions of `latentact.envs.adapt.adapt`."""

    def __init__(
        self,
        env: gym.Env,
        *,
        name: str,
        pixels: Callable[[Any], np.ndarray],
        resolution: int,
        success: Callable[[float, bool, dict], bool | None],
        state: Callable[[Any], np.ndarray] | None,
        state_range: tuple[np.ndarray, np.ndarray] | None,
        task: Callable[[], str],
        floor: Callable[[np.ndarray], np.ndarray] | None,
        heading: Callable[[Any], np.ndarray] | None,
    ) -> None:
        super().__init__(env)
        self._name, self._floor, self._heading = name, floor, heading
        self._distraction = Distraction()
        self._distractor: Distractor | None = None
        self._pixels, self._resolution, self._state = pixels, resolution, state
        self._task, self._success = task, success
        self._state_size = 0 if state_range is None else len(state_range[0])
        self._seed: int | None = 0
        self._steps, self._draws = 0, True
        self._shape: tuple[int, ...] | None = None
        with env_errors(name, "at reset"):
            first, _ = env.reset(seed=0)
            self._shape = self._frame(first).shape
        spaces: dict[str, gym.Space] = {"pixels": gym.spaces.Box(0, 255, self._shape, np.uint8)}
        if state_range is not None:
            low, high = (np.asarray(bound, np.float32) for bound in state_range)
            spaces["agent_pos"] = gym.spaces.Box(low, high, dtype=np.float32)
        self.observation_space = gym.spaces.Dict(spaces)

    @property
    def spec(self) -> None:
        """None: `gymnasium.make` cannot create it; `make_env` can."""
        return

    def distract(self, distraction: Distraction) -> None:
        """Add distractors to the frames from the next reset on; `info["nuisance"]` holds their state."""
        if distraction and self._heading is None:
            raise UserError(
                f"{self._name} must have image observations for distractors, got none. Choose an "
                "environment with images."
            )
        if distraction.background and self._floor is None:
            raise UserError(
                f"{self._name} must have a background mask for the distractor background, got none. Use "
                "shake or appearance, or an environment of babyai, pusht or metaworld."
            )
        self._distraction = distraction

    def draw(self, frames: bool) -> None:
        """Set whether frames are drawn; otherwise they are black."""
        self._draws = frames

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """Start an episode; `info["task"]` is its task text."""
        self._seed, self._steps = seed, 0
        with env_errors(self._name, f"at reset with seed {seed}"):
            observation, info = self.env.reset(seed=seed, options=options)
            self._distractor = Distractor(self._distraction, seed) if self._distraction else None
            out = self._observation(observation)
            return out, {**(info or {}), **self._nuisance(), "task": self._task()}

    def step(self, action):
        """Take a valid action; `info["is_success"]` is set if the environment reports success."""
        self._steps += 1
        action = self._checked(action)
        with env_errors(self._name, self._where()):
            if self._distractor and self._heading:
                self._distractor.step(self._heading(action))
            observation, reward, terminated, truncated, info = self.env.step(action)
            reward = _scalar(reward)
            if not np.isfinite(reward):
                raise self._unusable("finite reward", reward)
            terminated = to_bool(terminated, f"{self._name}: terminated")
            truncated = to_bool(truncated, f"{self._name}: truncated")
            info = {**(info or {}), **self._nuisance()}
            success = self._success(reward, terminated, info)
            if success is not None:
                info["is_success"] = bool(success)
            return self._observation(observation), reward, terminated, truncated, info

    def close(self) -> None:
        """Close the environment."""
        close(self.env, self._name)

    def _where(self) -> str:
        return f"at step {self._steps} of the episode with reset seed {self._seed}"

    def _unusable(self, expected: str, got: Any) -> EnvError:
        return EnvError(
            f"{self._name} must return a {expected}, got {got} {self._where()}. Fix the environment, or "
            "choose another."
        )

    def _invalid(self, given: np.ndarray, expected: str, remedy: str) -> UserError:
        return UserError(
            f"the action of step {self._steps} in {self._name} must be {expected}, got "
            f"{given.tolist()!r}. {remedy}"
        )

    def _checked(self, action: Any) -> int | np.ndarray:
        """Return a valid action for the environment; see the module's docstring."""
        space: Any = self.env.action_space
        given = np.asarray(action)
        other = "Choose a policy that was trained for this environment."
        if isinstance(space, gym.spaces.Discrete):
            first, last = int(space.start), int(space.start + space.n) - 1
            if given.dtype.kind not in "iu" or given.size != 1 or not first <= given.item() <= last:
                raise self._invalid(given, f"an integer from {first} to {last}", other)
            return int(given.item())
        if given.dtype.kind not in "iuf" or given.shape != space.shape:
            raise self._invalid(given, f"numbers of shape {space.shape}", other)
        if not np.isfinite(given).all():
            raise self._invalid(given, "finite", "Train the policy again, with a smaller learning rate.")
        given = np.rint(given) if np.issubdtype(space.dtype, np.integer) else given
        bounded = np.clip(given, space.low, space.high)
        if (bounded != given).any():
            _warn_clipped(self._name)
        return bounded.astype(space.dtype)

    def _nuisance(self) -> dict[str, np.ndarray]:
        return {"nuisance": self._distractor.nuisance} if self._distractor else {}

    def _observation(self, observation: Any) -> dict[str, np.ndarray]:
        out = {"pixels": self._frame(observation)}
        if self._state is not None:
            state = np.array(self._state(observation), np.float32)
            if state.shape != (self._state_size,) or not np.isfinite(state).all():
                raise self._unusable(f"finite state of {self._state_size} dimensions", state.tolist())
            out["agent_pos"] = state
        return out

    def _frame(self, observation: Any) -> np.ndarray:
        if not self._draws and self._shape is not None:
            return np.zeros(self._shape, np.uint8)
        frame = self._pixels(observation)
        if self._distractor:
            needed = self._distraction.background or self._distraction.appearance
            floor = self._floor(frame) if needed and self._floor else None
            frame = self._distractor.draw(frame, floor)
        size = (self._resolution, self._resolution)
        if self._resolution and frame.shape[:2] != size:
            frame = np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX))
        if self._shape is not None and frame.shape != self._shape:
            raise self._unusable(f"frame of size {self._shape[:2]} as the first one", frame.shape[:2])
        return frame


def _scalar(value: Any) -> float:
    """Return a scalar, array or tensor of one element as a float."""
    return float(value.item() if hasattr(value, "item") else np.asarray(value).item())


@functools.cache
def _warn_clipped(name: str) -> None:
    """Warn once that actions are clipped."""
    log.warning("%s: actions outside its bounds are clipped to them", name)
