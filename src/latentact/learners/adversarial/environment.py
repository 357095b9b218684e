"""The environment as GAIL's generator gets it: normalized numbers, and a fixed horizon by choice."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from jaxtyping import Float32, Shaped

from latentact.policies.contract import Policy
from latentact.policies.network import STATE_LIMIT
from latentact.types import ActionSpace


class NormalizedEnv(gym.Wrapper):
    """An environment of `make_env` with normalized states as observations, and normalized actions.

    With a horizon no episode terminates: after its end the last observation repeats, without reward, until
    that many steps (`AbsorbAfterDoneWrapper` of HumanCompatibleAI/seals). Then its length does not tell how
    good a policy is. `info["over"]` says of a step whether it was after the end.

    Args:
        env: the environment.
        policy: its means and deviations, those of the demonstrations, normalize.
        space: robot action.
        horizon: steps of every episode; 0: the environment's own ends.
        max_steps: steps after which an episode is cut; 0: none.
        seed: of the episodes.
    """

    def __init__(
        self, env: gym.Env, policy: Policy, space: ActionSpace, horizon: int, max_steps: int, seed: Any
    ) -> None:
        super().__init__(env)
        self._mean, self._std = (t.numpy(force=True) for t in (policy.state_mean, policy.state_std))
        self._horizon, self._limit, self._values = horizon, horizon or max_steps, space.values
        self._random = np.random.default_rng(seed)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, self._mean.shape, np.float32)
        self._shift, self._scale = np.float32(0), np.float32(1)
        inner: Any = env.action_space
        if space.discrete:
            self.action_space = gym.spaces.Discrete(space.size)
        else:
            self._shift, self._scale = (t.numpy(force=True) for t in (policy.mean, policy.std))
            low, high = ((bound - self._shift) / self._scale for bound in (inner.low, inner.high))
            self.action_space = gym.spaces.Box(low, high, dtype=np.float32)
        self._discrete, self._steps, self._over, self._return = space.discrete, 0, False, 0.0
        self._last = np.zeros(self._mean.shape, np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Begin the next episode; its reset seed is drawn."""
        observation, info = self.env.reset(seed=int(self._random.integers(2**31)), options=options)
        self._steps, self._over, self._return = 0, False, 0.0
        self._last = self._normal(observation)
        return self._last, info

    def step(self, action: Any) -> Any:
        """Take a normalized action; the last info of an episode holds its `return`."""
        self._steps += 1
        over, reward, terminated, truncated = self._over, 0.0, False, False
        if not over:
            inner = (
                (self._values[action] if self._values else int(action))
                if self._discrete
                else action * self._scale + self._shift
            )
            observation, reward, terminated, truncated, _ = self.env.step(inner)
            self._last = self._normal(observation)
            self._return += float(reward)
        if self._horizon:
            self._over |= terminated or truncated
            terminated = truncated = False
        truncated = truncated or self._steps == self._limit
        info: dict[str, Any] = {"over": over}
        if terminated or truncated:
            info["return"] = self._return
        return self._last, float(reward), terminated, truncated, info

    def _normal(self, observation: dict[str, np.ndarray]) -> Float32[np.ndarray, " s"]:
        state = (observation["agent_pos"] - self._mean) / self._std
        return state.clip(-STATE_LIMIT, STATE_LIMIT).astype(np.float32)


def encode_steps(
    states: Float32[np.ndarray, "n s"],
    actions: Shaped[np.ndarray, "n *a"],
    over: Shaped[np.ndarray, " n"],
    space: ActionSpace,
) -> Float32[np.ndarray, "n f"]:
    """Return steps as the discriminator gets them: state, then action.

    Args:
        states: normalized, and limited.
        actions: class indices, or normalized numbers.
        over: whether a step was after the end of its episode; its action is then hidden.
        space: robot action.
    """
    numbers = np.eye(space.size, dtype=np.float32)[actions] if space.discrete else actions
    numbers = np.where(over[:, None], 0, numbers)
    return np.concatenate([states, numbers], axis=1).astype(np.float32)
