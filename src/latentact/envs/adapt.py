"""Map any environment to the observations of latentact, `{"pixels", "agent_pos"}`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from latentact.envs.boundary import import_gymnasium

if TYPE_CHECKING:
    import gymnasium as gym


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
    """Return `env` with the observation and info of `make_env`.

    Args:
        env: the original environment.
        name: its name in messages.
        pixels: its observation -> uint8 `[h, w, 3]`.
        resolution: frames are resized to this height and width; 0: left as they are.
        success: `(reward, terminated, info)` of a step -> whether the task is done; None: not reported.
        state: its observation -> floats `[s]`; None: the environment has no state.
        state_range: smallest and largest state, `[s]` each.
        task: returns the task text of the current episode.
        floor: frame -> opacity of the distracting background `[h, w]`, 0 to 1; None: there is none.
        heading: action, before it is taken -> its direction `[2]`, about unit length; None: no distractors.

    Raises:
        EnvError: its first reset fails.
    """
    import_gymnasium()
    from latentact.envs.adapter import Adapter

    return Adapter(
        env,
        name=name,
        pixels=pixels,
        resolution=resolution,
        success=success,
        state=state,
        state_range=state_range,
        task=task,
        floor=floor,
        heading=heading,
    )
