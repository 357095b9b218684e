"""PPO on the environment's reward, for any policy that outputs one robot action per step.

The network is the policy's own, so the result is saved like every policy, and nothing is pickled. With a
frozen latent policy only its decoder learns: the policy's features are computed once per environment step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Float
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor, nn

from latentact.io.tensors import load_tensors, load_weights
from latentact.learners.ppo.environment import PolicyEnv
from latentact.learners.ppo.train import MappedEnvs, build_ppo, format_mean, make_envs, train
from latentact.policies.contract import Policy
from latentact.policies.spec import robot_action_target

COLUMNS = ("train/return", "train/success", "train/episodes")


class PolicyFeatures(nn.Module):
    """Observations to the inputs of the actor and of the critic.

    Args:
        policy: the policy.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, observation: dict[str, Tensor]) -> tuple[Float[Tensor, "b f"], Float[Tensor, "b d"]]:
        """Return the actor's inputs, then the critic's, which are the policy's features.

        The actor's inputs are those of the decoder, followed by the normalized state if the decoder uses it;
        without a decoder they are the scores of the actions.

        Args:
            observation: a batch of observations of `PolicyEnv`.
        """
        policy, size = self.policy, len(next(iter(observation.values())))
        frames, words = torch.zeros(size, 0), observation.get("words", torch.zeros(size, 0))
        if policy.uses_frames:
            frames = observation["frames"].to(torch.uint8).permute(0, 1, 4, 2, 3)
        state = observation.get("state")
        out, features = policy.forward_with_features(frames, state, words)
        if policy.decoder is None:
            return out[:, 0], features
        latent = policy.decoder_input(out)[:, 0]
        if policy.decoder.config.use_state:
            latent = torch.cat([latent, policy.normal_state(state)], dim=1)
        return latent, features


class _Frozen(MappedEnvs):
    """Environments that return the features of a frozen policy, computed once."""

    def __init__(self, envs: Any, features: PolicyFeatures) -> None:
        @torch.no_grad()
        def function(observations: dict[str, np.ndarray]) -> np.ndarray:
            inputs = {name: torch.from_numpy(value) for name, value in observations.items()}
            return torch.cat(features(inputs), dim=1).numpy()

        super().__init__(envs, function(envs.reset()).shape[1], function)


class _Extractor(BaseFeaturesExtractor):
    """Observations to one vector: the actor's inputs, then the critic's."""

    def __init__(self, space: gym.Space, features: PolicyFeatures, size: int) -> None:
        super().__init__(space, size)
        self.features = features

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        """Return the vectors of a batch."""
        return torch.cat(self.features(observations), dim=1)


class ActorNetwork(nn.Module):
    """Map features to scores of actions, through the decoder if there is one.

    Args:
        policy: the policy.
        size: number of the actor's inputs, which are the first features.
    """

    def __init__(self, policy: Policy, size: int) -> None:
        super().__init__()
        self.decoder, self.size = policy.decoder, size
        uses_state = policy.decoder is not None and policy.decoder.config.use_state
        self.latent_size = size - (policy.spec.state_size if uses_state else 0)

    def forward(self, features: Float[Tensor, "b f"]) -> Float[Tensor, "b a"]:
        """Return logits, or normalized actions."""
        inputs = features[:, : self.size]
        if self.decoder is None:
            return inputs
        latent, state = inputs[:, : self.latent_size], inputs[:, self.latent_size :]
        decode = self.decoder.mix if self.decoder.config.mixture else self.decoder
        return decode(latent[:, None], state if self.decoder.config.use_state else None)[:, 0]


class _Critic(nn.Module):
    """Map features to values; the first `skip` features are the actor's."""

    def __init__(self, skip: int, size: int) -> None:
        super().__init__()
        self.skip, self.net = skip, nn.Sequential(nn.Linear(size, 128), nn.ReLU(), nn.Linear(128, 1))

    def forward(self, features: Float[Tensor, "b f"]) -> Float[Tensor, "b 1"]:
        """Return the values of a batch."""
        return self.net(features[:, self.skip :])


def train_online(
    policy: Policy,
    make_env: Callable[[int], PolicyEnv],
    settings: Any,
    *,
    steps: int,
    lr: float,
    frozen: bool,
    seed: int,
    name: str,
    metrics: Path,
    critic: Path | None = None,
) -> dict[str, Tensor]:
    """Train a policy in place for the environment's reward and return the weights of its critic.

    Args:
        policy: outputs robot actions, through its decoder if it has one; one per step.
        make_env: number -> one of the environments in which it acts in parallel.
        settings: `OnlineConfig`.
        steps: environment steps.
        lr: initial learning rate, decayed linearly to 0.
        frozen: whether only the decoder learns.
        seed: random seed.
        name: name of the training, for its progress.
        metrics: CSV file with return and success by step.
        critic: file of the weights of the critic to start with; None: random ones.
    """
    torch.manual_seed(seed)
    policy.eval()
    envs: Any = make_envs(make_env, settings.envs)
    features = PolicyFeatures(policy)
    with torch.no_grad():
        first = {name: torch.from_numpy(value) for name, value in envs.reset().items()}
        actor_size, critic_size = (part.shape[1] for part in features(first))
    networks: dict[str, Any] = {"net_arch": [], "ortho_init": False, "normalize_images": False}
    if frozen:
        envs = _Frozen(envs, features)
    else:
        networks["features_extractor_class"] = _Extractor
        networks["features_extractor_kwargs"] = {"features": features, "size": actor_size + critic_size}
    share = settings.envs * settings.rollout_steps / steps  # `left` is what remains after a rollout
    ppo = build_ppo(
        "MlpPolicy" if frozen else "MultiInputPolicy",
        VecNormalize(envs, norm_obs=False, gamma=settings.gamma),
        settings,
        learning_rate=lambda left: lr * min(1.0, left + share),
        seed=seed,
        **networks,
    )
    actor_critic: Any = ppo.policy
    actor_critic.action_net, actor_critic.value_net = (
        ActorNetwork(policy, actor_size),
        _Critic(actor_size, critic_size),
    )
    if critic is not None:
        load_weights(actor_critic.value_net, load_tensors(critic), critic)
    actor_critic.optimizer = torch.optim.Adam(actor_critic.parameters(), lr=lr, eps=1e-5)
    train(
        ppo,
        steps,
        name=name,
        metrics=metrics,
        columns=COLUMNS,
        row=lambda ended: (*(format_mean(ended, key) for key in ("return", "success")), len(ended)),
    )
    envs.close()
    policy.eval()
    return {key: value.detach().clone() for key, value in actor_critic.value_net.state_dict().items()}


def from_scratch(policy: Policy) -> Policy:
    """Return a policy of the same network with random weights, for the same robot actions.

    Args:
        policy: a grounded latent policy; its statistics of the state are copied.
    """
    spec, config = policy.spec, policy.config.behavior_cloning()
    fresh = config.build(replace(spec, target=robot_action_target(spec.action_space, config.kind)))
    fresh.state_mean.copy_(policy.state_mean)
    fresh.state_std.copy_(policy.state_std)
    return fresh
