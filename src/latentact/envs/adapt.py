"""The one wrapper behind every environment: its own observation in, `{"pixels", "agent_pos"}` out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from latentact.envs.distract import Distraction, Distractor
from latentact.errors import UserError, missing_extra

if TYPE_CHECKING:
    import gymnasium as gym


def import_gymnasium() -> Any:
    """Return the module, or raise the UserError that names the extra it comes with."""
    try:
        import gymnasium
    except ModuleNotFoundError as error:
        raise missing_extra("gymnasium", "envs") from error
    return gymnasium


def adapt(
    env: gym.Env,
    *,
    pixels: Callable[[Any], np.ndarray],
    resolution: int,
    success: Callable[[float, bool, dict], bool | None],
    state: Callable[[Any], np.ndarray] | None = None,
    state_range: tuple[np.ndarray, np.ndarray] | None = None,
    task: Callable[[], str] = str,
    floor: Callable[[np.ndarray], np.ndarray] | None = None,
    heading: Callable[[Any], np.ndarray] | None = None,
) -> gym.Env:
    """Return `env` with the observation and info that `make_env` promises.

    Args:
        env: the environment as it comes.
        pixels: its observation -> uint8 `[h, w, 3]`.
        resolution: frames are resized to this height and width; 0: left as they are.
        success: `(reward, terminated, info)` of a step -> whether the task is done; None: nobody can tell.
        state: its observation -> numbers `[s]`; None: the environment has no state.
        state_range: smallest and largest state, `[s]` each.
        task: returns the task's text of the present episode.
        floor: frame -> where a distracting background shows `[h, w]`, 0 nowhere, 1 fully; None: there are
            no distractors.
        heading: action, before it is taken -> where it goes `[2]`, about one in size; None: as before.
    """
    return _adapter()(env, pixels, resolution, state, state_range, task, success, floor, heading)


@functools.cache
def _adapter() -> Callable[..., gym.Env]:
    gymnasium = import_gymnasium()

    class Adapter(gymnasium.Wrapper):
        """See `adapt`."""

        def __init__(self, env, pixels, resolution, state, state_range, task, success, floor, heading):
            super().__init__(env)
            self._floor, self._heading = floor, heading
            self._distraction, self._distractor = Distraction(), None
            self._pixels, self._resolution, self._state = pixels, resolution, state
            self._task, self._success = task, success
            first, _ = env.reset(seed=0)
            spaces = {"pixels": gymnasium.spaces.Box(0, 255, self._frame(first).shape, np.uint8)}
            if state is not None:
                low, high = (np.asarray(bound, np.float32) for bound in state_range)
                spaces["agent_pos"] = gymnasium.spaces.Box(low, high, dtype=np.float32)
            self.observation_space = gymnasium.spaces.Dict(spaces)

        @property
        def spec(self) -> None:
            """None: `gymnasium.make` cannot make it again; `make_env` can."""
            return

        def distract(self, distraction: Distraction) -> None:
            """Let distractors into the frames from the next reset on; `info["nuisance"]` tells where."""
            if distraction and (self._floor is None or self._heading is None):
                raise UserError("this environment has no distractors; those of babyai/LEVEL and pusht have.")
            self._distraction = distraction

        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
            observation, info = self.env.reset(seed=seed, options=options)
            self._distractor = Distractor(self._distraction, seed) if self._distraction else None
            return self._observation(observation), {**info, **self._nuisance(), "task": self._task()}

        def step(self, action):
            if self._distractor:
                self._distractor.step(self._heading(action))
            observation, reward, terminated, truncated, info = self.env.step(action)
            success = self._success(float(reward), bool(terminated), info)
            if success is not None:
                info = {**info, "is_success": bool(success)}
            info = {**info, **self._nuisance()}
            return self._observation(observation), float(reward), bool(terminated), bool(truncated), info

        def _nuisance(self) -> dict[str, np.ndarray]:
            return {"nuisance": self._distractor.nuisance} if self._distractor else {}

        def _observation(self, observation: Any) -> dict[str, np.ndarray]:
            out = {"pixels": self._frame(observation)}
            if self._state is not None:
                out["agent_pos"] = np.asarray(self._state(observation), np.float32)
            return out

        def _frame(self, observation: Any) -> np.ndarray:
            frame = self._pixels(observation)
            if self._distractor:
                frame = self._distractor.draw(frame, self._floor(frame))
            size = (self._resolution, self._resolution)
            if not self._resolution or frame.shape[:2] == size:
                return frame
            from PIL import Image

            return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX))

    return Adapter
