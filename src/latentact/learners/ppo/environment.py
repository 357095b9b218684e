"""Environments as PPO acts in them: a policy's inputs as observations, and normalized actions."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from latentact.agents.agent import IMAGES
from latentact.agents.own import PolicyObservations
from latentact.envs.episode import to_observation
from latentact.policies.contract import Policy


class PolicyEnv(gym.Wrapper):
    """An environment of `make_env` with the inputs of a policy as observations, and normalized actions.

    An observation is a dict of what the policy uses: `frames` uint8 ``[n_obs_steps, h, w, c]``, latest last;
    `state` float32 ``[s]``, in the environment's units; `words` float32 ``[v]``, as in `Policy.features`. An
    action is a class index, or float32 ``[a]`` at the mean and standard deviation of the policy's actions.
    The last info of an episode holds its `return` and `success`.

    With a horizon no episode terminates: after its end the last observation repeats, without reward, until
    that many steps (`AbsorbAfterDoneWrapper` of HumanCompatibleAI/seals). Then its length does not tell how
    good a policy is. `info["over"]` is whether a step was after the end.

    Args:
        env: the environment.
        policy: a policy that outputs robot actions, one per step.
        max_steps: steps after which an episode is truncated; 0: the environment's own limit.
        seed: seed of the reset seeds of the episodes.
        horizon: steps of every episode; 0: the environment's own ends.
    """

    def __init__(self, env: gym.Env, policy: Policy, *, max_steps: int, seed: Any, horizon: int = 0) -> None:
        super().__init__(env)
        self._observations, self._random = PolicyObservations(policy), np.random.default_rng(seed)
        self._horizon, self._limit = horizon, horizon or max_steps
        spec, pixels = policy.spec, env.observation_space["pixels"]  # type: ignore[index]
        spaces: dict[str, gym.Space] = {}
        if policy.uses_frames:
            shape = (policy.config.network.n_obs_steps, *pixels.shape)
            spaces["frames"] = gym.spaces.Box(0, 255, shape, np.uint8)
        if policy.uses_state:
            spaces["state"] = gym.spaces.Box(-np.inf, np.inf, (spec.state_size,), np.float32)
        if spec.words:
            spaces["words"] = gym.spaces.Box(0, np.inf, (len(spec.words),), np.float32)
        self.observation_space = gym.spaces.Dict(spaces)
        self._uses_frames = policy.uses_frames
        actions, inner = spec.action_space, env.action_space
        assert actions is not None
        self._classes: tuple[int, ...] = ()
        if actions.discrete:
            self._classes = actions.values or tuple(range(actions.size))
            self.action_space = gym.spaces.Discrete(actions.size)
        else:
            assert isinstance(inner, gym.spaces.Box)
            scale = policy.decoder or policy
            self._mean, self._std = (each.numpy(force=True) for each in (scale.mean, scale.std))
            low, high = ((bound - self._mean) / self._std for bound in (inner.low, inner.high))
            self.action_space = gym.spaces.Box(low, high, dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Begin the next episode; its reset seed is drawn."""
        observation, info = self.env.reset(seed=int(self._random.integers(2**31)), options=options)
        self._observations.reset()
        self._words = self._observations.words([info["task"]])[0]
        self._steps, self._return, self._success, self._over = 0, 0.0, False, False
        self._latest = self._inputs(observation)
        return self._latest, info

    def step(self, action: Any) -> Any:
        """Take an action."""
        self._steps += 1
        over, reward, terminated, truncated = self._over, 0.0, False, False
        if not over:
            taken = self._classes[int(action)] if self._classes else action * self._std + self._mean
            observation, reward, terminated, truncated, info = self.env.step(taken)
            self._latest = self._inputs(observation)
            self._return += float(reward)
            self._success |= bool(info.get("is_success", False))
        if self._horizon:
            self._over |= terminated or truncated
            terminated = truncated = False
        truncated = truncated or self._steps == self._limit
        info = {"over": over}
        if terminated or truncated:
            info |= {"return": self._return, "success": self._success}
        return self._latest, float(reward), terminated, truncated, info

    def _inputs(self, observation: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the policy's inputs at this timestep; the words are those of the episode's task."""
        batch, inputs = to_observation([observation], [""], IMAGES), {}
        if self._uses_frames:
            self._observations.append(batch)
            inputs["frames"] = self._observations.frames[0]
        if (state := self._observations.state(batch)) is not None:
            inputs["state"] = state[0]
        if len(self._words):
            inputs["words"] = self._words
        return inputs
