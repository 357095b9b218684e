"""GAIL's generator: PPO on the discriminator's reward.

PPO's actor has the layers of a policy of `backbone=state`, and its weights are copied from and to one: the
result is saved like every policy, and nothing is pickled.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from latentact.learners.ppo.discriminator import (
    Discriminator,
    RewardKind,
    encode_steps,
    imitation_reward,
    normalize_states,
)
from latentact.learners.ppo.environment import PolicyEnv
from latentact.learners.ppo.train import MappedEnvs, build_ppo, format_mean, make_envs, train
from latentact.policies.contract import Policy

COLUMNS = ("train/return", "train/imitation_reward", "train/discriminator_accuracy")


class _Rewarded(MappedEnvs):
    """Environments with normalized states and the discriminator's reward; they record steps and rewards."""

    def __init__(self, envs: VecEnv, policy: Policy, discriminator: Discriminator, kind: RewardKind) -> None:
        assert policy.spec.action_space is not None
        super().__init__(
            envs,
            policy.spec.state_size,
            lambda observations: normalize_states(policy, observations["state"]),
        )
        self.discriminator, self.space = discriminator, policy.spec.action_space
        self.kind: RewardKind = kind
        self.steps: list[np.ndarray] = []
        self.rewards: list[float] = []

    def reset(self) -> np.ndarray:
        """Begin the first episodes."""
        self._states = super().reset()
        return self._states

    def step_async(self, actions: np.ndarray) -> None:
        """Take actions, which are within the bounds."""
        self._actions = actions
        super().step_async(actions)

    def step_wait(self) -> Any:
        """Return the results of a step, with the discriminator's reward."""
        states, _, dones, infos = super().step_wait()
        over = np.array([info["over"] for info in infos])
        steps = encode_steps(self._states, self._actions, over, self.space)
        with torch.no_grad():
            reward = imitation_reward(self.discriminator(torch.from_numpy(steps)), self.kind).numpy()
        self.steps.append(steps)
        self.rewards.append(float(reward.mean()))
        self._states = states
        return states, reward, dones, infos


def train_gail(
    policy: Policy,
    make_env: Callable[[int], PolicyEnv],
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
        policy: a policy of `backbone=state` that outputs robot actions.
        make_env: number -> one of the environments in which it acts in parallel.
        expert: the expert's steps, encoded.
        settings: `GailConfig`.
        seed: random seed.
        warm: whether to start with the policy's weights.
        name: name of the training, for its progress.
        metrics: CSV file with returns, rewards and the discriminator's accuracy by step.
    """
    torch.manual_seed(seed)
    discriminator = Discriminator(
        expert.shape[1], settings.discriminator_hidden, settings.discriminator_lr, settings.gradient_penalty
    )
    envs = _Rewarded(make_envs(make_env, settings.envs), policy, discriminator, settings.reward)
    hidden = [*policy.config.network.hidden]  # type: ignore[attr-defined]
    ppo = build_ppo(
        "MlpPolicy",
        envs,
        settings,
        learning_rate=lambda left: settings.lr * left,
        seed=seed,
        net_arch={"pi": hidden, "vf": hidden},
        activation_fn=nn.Tanh,
        log_std_init=settings.log_std,
    )
    actor: Any = ppo.policy
    pairs = [(policy.encoder, actor.mlp_extractor.policy_net), (policy.output_layer, actor.action_net)]
    if warm:
        for ours, theirs in pairs:
            theirs.load_state_dict(ours.state_dict())  # type: ignore[union-attr]
    demonstrated, batch_size = torch.from_numpy(expert), settings.discriminator_batch

    def update(ended: list[dict[str, Any]]) -> list[str]:
        """Update the discriminator on the steps of a rollout; return the row of metrics."""
        own = torch.from_numpy(np.concatenate(envs.steps))
        accuracy = [
            discriminator.update(
                *(steps[torch.randint(len(steps), (batch_size,))] for steps in (demonstrated, own))
            )
            for _ in range(settings.discriminator_updates)
        ]
        means = [f"{np.mean(values):.5g}" for values in (envs.rewards, accuracy)]
        envs.steps, envs.rewards = [], []
        return [format_mean(ended, "return"), *means]

    train(ppo, settings.steps, name=name, metrics=metrics, columns=COLUMNS, row=update)
    envs.close()
    for ours, theirs in pairs:
        ours.load_state_dict(theirs.state_dict())  # type: ignore[union-attr]
