"""GAIL's generator: stable-baselines3's PPO on the discriminator's reward.

PPO's actor has the layers of a policy of `backbone=state`, and its weights are copied from and to one: the
result is saved as any policy is, and nothing is pickled.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper
from torch import nn

from latentact.learners.adversarial.discriminator import Discriminator, RewardKind, imitation_reward
from latentact.learners.adversarial.environment import NormalizedEnv, encode_steps
from latentact.policies.contract import Policy
from latentact.progress import Progress
from latentact.types import ActionSpace

COLUMNS = ("step", "train/return", "train/imitation_reward", "train/discriminator_accuracy")


class _Rewarded(VecEnvWrapper):
    """Environments with the discriminator's reward; keeps the steps for its next update."""

    def __init__(
        self, envs: DummyVecEnv, discriminator: Discriminator, kind: RewardKind, space: ActionSpace
    ) -> None:
        super().__init__(envs)
        self.discriminator, self.space = discriminator, space
        self.kind: RewardKind = kind
        self.taken: list[np.ndarray] = []
        self.rewards: list[float] = []
        self.returns: list[float] = []

    def reset(self) -> np.ndarray:
        """Begin the first episodes."""
        self._last = np.asarray(self.venv.reset())
        return self._last

    def step_async(self, actions: np.ndarray) -> None:
        """Take actions, which are within the bounds."""
        self._actions = actions
        self.venv.step_async(actions)

    def step_wait(self) -> Any:
        """Return what the environments do, with the discriminator's reward."""
        observations, _, dones, infos = self.venv.step_wait()
        over = np.array([info["over"] for info in infos])
        steps = encode_steps(self._last, self._actions, over, self.space)
        with torch.no_grad():
            reward = imitation_reward(self.discriminator(torch.from_numpy(steps)), self.kind).numpy()
        self.taken.append(steps)
        self.rewards.append(float(reward.mean()))
        self.returns += [info["return"] for info in infos if "return" in info]
        self._last = np.asarray(observations)
        return observations, reward, dones, infos


class _Discriminate(BaseCallback):
    """Updates the discriminator after every rollout, and logs."""

    def __init__(
        self, env: _Rewarded, expert: torch.Tensor, updates: int, batch: int, log: Any, progress: Progress
    ) -> None:
        super().__init__()
        self._env, self._expert, self._updates, self._batch = env, expert, updates, batch
        self._log, self._progress, self._before = log, progress, 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        env, own = self._env, torch.from_numpy(np.concatenate(self._env.taken))
        accuracy = [
            env.discriminator.update(
                *(steps[torch.randint(len(steps), (self._batch,))] for steps in (self._expert, own))
            )
            for _ in range(self._updates)
        ]
        mean = f"{np.mean(env.returns):.5g}" if env.returns else ""
        values = (np.mean(env.rewards), np.mean(accuracy))
        self._log.writerow([self.num_timesteps, mean, *(f"{value:.5g}" for value in values)])
        env.taken, env.rewards, env.returns = [], [], []
        self._progress.advance(self.num_timesteps - self._before)
        self._before = self.num_timesteps


def train_ppo(
    policy: Policy,
    make_env: Callable[[int], NormalizedEnv],
    expert: Float32[np.ndarray, "n f"],
    settings: Any,
    *,
    seed: int,
    warm: bool,
    name: str,
    metrics: Path,
) -> None:
    """Train the policy in place to take steps that the discriminator takes for the expert's.

    Args:
        policy: of `backbone=state`, which outputs robot actions.
        make_env: number -> one of the environments in which it acts side by side.
        expert: the expert's steps, encoded.
        settings: `GailConfig`.
        seed: of everything that is drawn.
        warm: whether to start with the policy's weights.
        name: of the run, for progress.
        metrics: CSV file with returns, rewards and the discriminator's accuracy by step.
    """
    space, hidden = policy.spec.action_space, [*policy.config.network.hidden]  # type: ignore[attr-defined]
    assert space is not None
    torch.manual_seed(seed)
    discriminator = Discriminator(
        expert.shape[1], settings.discriminator_hidden, settings.discriminator_lr, settings.gradient_penalty
    )
    envs = DummyVecEnv([lambda number=number: make_env(number) for number in range(settings.envs)])
    rewarded = _Rewarded(envs, discriminator, settings.reward, space)
    ppo = PPO(
        "MlpPolicy",
        rewarded,
        n_steps=settings.rollout_steps,
        batch_size=settings.batch_size,
        n_epochs=settings.epochs,
        learning_rate=lambda left: settings.lr * left,
        gamma=settings.gamma,
        gae_lambda=settings.gae_lambda,
        ent_coef=settings.entropy,
        seed=seed,
        device="cpu",
        policy_kwargs={
            "net_arch": {"pi": hidden, "vf": hidden},
            "activation_fn": nn.Tanh,
            "log_std_init": settings.log_std,
        },
    )
    actor: Any = ppo.policy
    pairs = [(policy.encoder, actor.mlp_extractor.policy_net), (policy.head, actor.action_net)]  # type: ignore[attr-defined]
    if warm:
        for ours, theirs in pairs:
            theirs.load_state_dict(ours.state_dict())  # type: ignore[union-attr]
    metrics.parent.mkdir(parents=True, exist_ok=True)
    with metrics.open("w", newline="") as file, Progress(name, settings.steps, "steps") as progress:
        log = csv.writer(file)
        log.writerow(COLUMNS)
        callback = _Discriminate(
            rewarded,
            torch.from_numpy(expert),
            settings.discriminator_updates,
            settings.discriminator_batch,
            log,
            progress,
        )
        ppo.learn(settings.steps, callback=callback)
    rewarded.close()
    for ours, theirs in pairs:
        ours.load_state_dict(theirs.state_dict())  # type: ignore[union-attr]
