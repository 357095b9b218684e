"""Shared parts of PPO training: the algorithm, observations that are mapped in batches, and metrics."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper

from latentact.learners.ppo.environment import PolicyEnv
from latentact.progress import Progress


def make_envs(make_env: Callable[[int], PolicyEnv], count: int) -> DummyVecEnv:
    """Return environments that run in parallel; `make_env(number)` makes one of them."""
    return DummyVecEnv([lambda number=number: make_env(number) for number in range(count)])


class MappedEnvs(VecEnvWrapper):
    """Environments whose observations are mapped in batches, also the last one of a truncated episode.

    Args:
        envs: environments of `make_envs`.
        size: length of a mapped observation.
        function: observations of n environments -> float32 ``[n, size]``.
    """

    def __init__(self, envs: VecEnv, size: int, function: Callable[[Any], np.ndarray]) -> None:
        super().__init__(envs, observation_space=gym.spaces.Box(-np.inf, np.inf, (size,), np.float32))
        self._function = function

    def reset(self) -> np.ndarray:
        """Begin the first episodes."""
        return self._function(self.venv.reset())

    def step_wait(self) -> Any:
        """Return the results of a step."""
        observations, rewards, dones, infos = self.venv.step_wait()
        for info in infos:
            if last := info.get("terminal_observation"):
                one = {name: value[None] for name, value in last.items()}
                info["terminal_observation"] = self._function(one)[0]
        return self._function(observations), rewards, dones, infos


def build_ppo(
    policy: str,
    envs: VecEnv,
    settings: Any,
    *,
    learning_rate: Callable[[float], float],
    seed: int,
    **policy_kwargs: Any,
) -> PPO:
    """Return PPO with new networks, on the CPU.

    Args:
        policy: stable-baselines3's policy, "MlpPolicy" or "MultiInputPolicy".
        envs: the environments to act in.
        settings: `GailConfig` or `OnlineConfig`.
        learning_rate: remaining fraction of the training, 1 to 0, -> learning rate.
        seed: random seed.
        policy_kwargs: arguments of the policy.
    """
    return PPO(
        policy,
        envs,
        n_steps=settings.rollout_steps,
        batch_size=min(settings.batch_size, settings.envs * settings.rollout_steps),
        n_epochs=settings.epochs,
        learning_rate=learning_rate,
        gamma=settings.gamma,
        gae_lambda=settings.gae_lambda,
        ent_coef=settings.entropy,
        seed=seed,
        device="cpu",
        policy_kwargs=policy_kwargs,
    )


def train(
    ppo: PPO,
    steps: int,
    *,
    name: str,
    metrics: Path,
    columns: Sequence[str],
    row: Callable[[list[dict[str, Any]]], Sequence[Any]],
) -> None:
    """Train PPO, with a row of metrics after every rollout.

    Args:
        ppo: the algorithm.
        steps: environment steps.
        name: name of the training, for its progress.
        metrics: CSV file.
        columns: names of the columns after the first one, `step`.
        row: last infos of the episodes that ended in the rollout -> their values; called before the update.
    """
    metrics.parent.mkdir(parents=True, exist_ok=True)
    with metrics.open("w", newline="") as file, Progress(name, steps, "steps") as progress:
        csv.writer(file).writerow(("step", *columns))
        ppo.learn(steps, callback=_Metrics(file, row, progress))


def format_mean(ended: Sequence[dict[str, Any]], key: str) -> str:
    """Return the mean of an entry of infos for a CSV file; empty without infos."""
    return f"{np.mean([info[key] for info in ended]):.5g}" if ended else ""


class _Metrics(BaseCallback):
    """Writes a row of metrics and reports the progress after every rollout."""

    def __init__(self, file: Any, row: Callable[[list[Any]], Sequence[Any]], progress: Progress) -> None:
        super().__init__()
        self._file, self._row, self._progress = file, row, progress
        self._ended: list[dict[str, Any]] = []
        self._reported = 0

    def _on_step(self) -> bool:
        self._ended += [info for info in self.locals["infos"] if "return" in info]
        return True

    def _on_rollout_end(self) -> None:
        csv.writer(self._file).writerow([self.num_timesteps, *self._row(self._ended)])
        self._file.flush()
        self._ended = []
        self._progress.advance(self.num_timesteps - self._reported)
        self._reported = self.num_timesteps
