"""Experts of Gymnasium's classic control: functions of the true state, which act in any state.

CartPole-v1: a linear controller (return 500 of 500). Pendulum-v1: swing up by energy, then a PD controller
(return -139 on average; the start decides how much).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from latentact.envs.spec import EXPERTS, Expert

if TYPE_CHECKING:
    import gymnasium as gym

CARTPOLE_GAINS = np.array([0.1, 0.5, 10.0, 1.5])
"""Weights of position, velocity, angle and angular velocity."""
LARGEST_TORQUE = 2.0
"""Bound of Pendulum's action."""


class _Controller(Expert):
    """An expert whose action follows from the state.

    Args:
        env: the environment.
        control: its true state -> action.
    """

    def __init__(self, env: gym.Env, control: Callable[[Any], Any]) -> None:
        self._world: Any = env.unwrapped
        self._space, self._control = env.action_space, control

    def act(self, explore: np.random.Generator | None = None) -> Any:
        """Return the action for the environment's state; with `explore`, a random one."""
        if explore is None:
            return self._control(self._world.state)
        if hasattr(self._space, "n"):
            return int(explore.integers(self._space.n))  # type: ignore[attr-defined]
        return explore.uniform(self._space.low, self._space.high).astype(np.float32)  # type: ignore[attr-defined]


@EXPERTS.register("CartPole-v1")
def cartpole(env: gym.Env, seed: int) -> Expert:
    """Return the linear controller."""
    return _Controller(env, lambda state: int(CARTPOLE_GAINS @ np.asarray(state) > 0))


@EXPERTS.register("Pendulum-v1")
def pendulum(env: gym.Env, seed: int) -> Expert:
    """Return the swing-up controller."""
    return _Controller(env, _swing_up)


def _swing_up(state: np.ndarray) -> np.ndarray:
    """Return the torque `[1]` for an angle from the upright in radians, and its velocity."""
    angle, speed = float(state[0]), float(state[1])
    cos = np.cos(angle)
    if cos > 0.9:
        torque = -(12.0 * np.arctan2(np.sin(angle), cos) + 3.0 * speed)
    else:  # the energy upright and at rest is zero
        energy = speed * speed / 6 + 5.0 * (cos - 1)
        direction = speed if abs(speed) > 1e-3 else 1.0
        torque = -LARGEST_TORQUE * np.sign(direction) * np.sign(energy) if abs(energy) > 0.2 else 0.0
    return np.array([np.clip(torque, -LARGEST_TORQUE, LARGEST_TORQUE)], np.float32)
