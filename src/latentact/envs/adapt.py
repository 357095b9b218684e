"""The one wrapper behind every environment: its own observation in, `{"pixels", "agent_pos"}` out.

It is also the one edge to foreign code, for all commands. An action is checked by one rule: a discrete one
must be one of the environment's integers; a continuous one must have its shape and be finite, and is clipped
to its bounds. What the environment raises or returns that cannot be used becomes an `EnvError`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from latentact.envs.distract import Distraction, Distractor
from latentact.envs.spec import EnvError
from latentact.errors import UserError, missing_extra

if TYPE_CHECKING:
    import gymnasium as gym

log = logging.getLogger(__name__)


def import_gymnasium() -> Any:
    """Return the module, or raise the UserError that names the extra it comes with."""
    try:
        import gymnasium
    except ModuleNotFoundError as error:
        raise missing_extra("gymnasium", "envs") from error
    return gymnasium


@contextmanager
def env_errors(name: str, doing: str) -> Iterator[None]:
    """Turn what an environment raises into an EnvError that names it: `{name} failed {doing}: ...`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # foreign code may raise anything
        said = " ".join(str(error).split()).rstrip(".")
        raise EnvError(
            f"{name} failed {doing}: {type(error).__name__}{said and ': '}{said}. "
            "Mend the environment, or choose another."
        ) from error


def adapt(
    env: gym.Env,
    *,
    name: str,
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
        name: what it is called in messages.
        pixels: its observation -> uint8 `[h, w, 3]`.
        resolution: frames are resized to this height and width; 0: left as they are.
        success: `(reward, terminated, info)` of a step -> whether the task is done; None: nobody can tell.
        state: its observation -> numbers `[s]`; None: the environment has no state.
        state_range: smallest and largest state, `[s]` each.
        task: returns the task's text of the present episode.
        floor: frame -> where a distracting background shows `[h, w]`, 0 nowhere, 1 fully; None: there are
            no distractors.
        heading: action, before it is taken -> where it goes `[2]`, about one in size; None: as before.

    Raises:
        EnvError: its first reset fails.
    """
    return _adapter()(env, name, pixels, resolution, state, state_range, task, success, floor, heading)


@functools.cache
def _adapter() -> Callable[..., gym.Env]:
    gymnasium = import_gymnasium()

    class Adapter(gymnasium.Wrapper):
        """See `adapt`."""

        def __init__(self, env, name, pixels, resolution, state, state_range, task, success, floor, heading):
            super().__init__(env)
            self._name, self._floor, self._heading = name, floor, heading
            self._distraction, self._distractor = Distraction(), None
            self._pixels, self._resolution, self._state = pixels, resolution, state
            self._task, self._success = task, success
            self._state_size = 0 if state is None else len(state_range[0])
            self._seed, self._steps, self._shape = 0, 0, None
            with env_errors(name, "at reset"):
                first, _ = env.reset(seed=0)
                self._shape = self._frame(first).shape
            spaces = {"pixels": gymnasium.spaces.Box(0, 255, self._shape, np.uint8)}
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
            self._seed, self._steps = seed, 0
            with env_errors(self._name, f"at reset with seed {seed}"):
                observation, info = self.env.reset(seed=seed, options=options)
                self._distractor = Distractor(self._distraction, seed) if self._distraction else None
                out = self._observation(observation)
                return out, {**(info or {}), **self._nuisance(), "task": self._task()}

        def step(self, action):
            self._steps += 1
            action = self._checked(action)
            with env_errors(self._name, self._where()):
                if self._distractor:
                    self._distractor.step(self._heading(action))
                observation, reward, terminated, truncated, info = self.env.step(action)
                reward, terminated, truncated = map(_scalar, (reward, terminated, truncated))
                if not np.isfinite(reward):
                    raise self._unusable("finite reward", reward)
                info = {**(info or {}), **self._nuisance()}
                success = self._success(reward, bool(terminated), info)
                if success is not None:
                    info["is_success"] = bool(success)
                return self._observation(observation), reward, bool(terminated), bool(truncated), info

        def close(self) -> None:
            """Close the environment; what it raises then is no reason to lose what was done in it."""
            try:
                with env_errors(self._name, "to close"):
                    self.env.close()
            except EnvError as error:
                log.warning("%s", error)

        def _where(self) -> str:
            return f"at step {self._steps} of the episode with reset seed {self._seed}"

        def _unusable(self, wanted: str, got: Any) -> EnvError:
            return EnvError(
                f"{self._name} must return a {wanted}, got {got} {self._where()}. Mend the environment, or "
                "choose another."
            )

        def _checked(self, action: Any) -> int | np.ndarray:
            """Return an action as the environment takes it; the rule is in the module's docstring."""
            space, given = self.env.action_space, np.asarray(action)

            def refused(wanted: str, remedy: str) -> UserError:
                return UserError(
                    f"the action of step {self._steps} in {self._name} must be {wanted}, got "
                    f"{given.tolist()!r}. {remedy}"
                )

            other = "Choose a policy that was trained for this environment."
            if isinstance(space, gymnasium.spaces.Discrete):
                first, last = int(space.start), int(space.start + space.n) - 1
                if given.dtype.kind not in "iu" or given.size != 1 or not first <= given.item() <= last:
                    raise refused(f"an integer from {first} to {last}", other)
                return int(given.item())
            if given.dtype.kind not in "iuf" or given.shape != space.shape:
                raise refused(f"numbers of shape {space.shape}", other)
            if not np.isfinite(given).all():
                raise refused("finite", "Train the policy again, with a smaller learning rate.")
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
                state = np.asarray(self._state(observation), np.float32)
                if state.shape != (self._state_size,) or not np.isfinite(state).all():
                    raise self._unusable(f"finite state of {self._state_size} numbers", state.tolist())
                out["agent_pos"] = state
            return out

        def _frame(self, observation: Any) -> np.ndarray:
            frame = self._pixels(observation)
            if self._distractor:
                frame = self._distractor.draw(frame, self._floor(frame))
            size = (self._resolution, self._resolution)
            if self._resolution and frame.shape[:2] != size:
                from PIL import Image

                frame = np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX))
            if self._shape not in (None, frame.shape):
                raise self._unusable(f"frame of the first one's size {self._shape[:2]}", frame.shape[:2])
            return frame

    return Adapter


def _scalar(value: Any) -> float:
    """Return the one number of a number, an array or a tensor."""
    return float(value.item() if hasattr(value, "item") else np.asarray(value).item())


@functools.cache
def _warn_clipped(name: str) -> None:
    """Say once that actions are clipped."""
    log.warning("%s: actions outside its bounds are clipped to them", name)
