"""Train a policy with stable-baselines3's PPO on the environment's reward.

The network is the policy's own, so the result is saved as any policy is, and nothing is pickled. With a
frozen latent policy only its decoder learns: the policy's features are computed once per environment step.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Float
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper, VecNormalize
from torch import Tensor, nn

from latentact.data.samples import count_words
from latentact.io.tensors import load_tensors, load_weights
from latentact.policies.network import NetworkPolicy
from latentact.policies.spec import robot_action_target
from latentact.progress import Progress

COLUMNS = ("step", "train/return", "train/success", "train/episodes")


class ObservedEnv(gym.Wrapper):
    """An environment of `make_env` with a policy's observations: recent frames, state and task words.

    Args:
        env: the environment.
        policy: what will act in it.
        max_steps: steps after which an episode is cut; 0: none.
        seed: of the episodes; their reset seeds are drawn.
    """

    def __init__(self, env: gym.Env, policy: NetworkPolicy, max_steps: int, seed: Any) -> None:
        super().__init__(env)
        self._spec, self._limit, self._random = policy.spec, max_steps, np.random.default_rng(seed)
        self._keep = policy.config.network.n_obs_steps
        space = policy.spec.action_space
        assert space is not None
        self._values = space.values or tuple(range(space.size)) if space.discrete else ()
        scale = policy if policy.decoder is None else policy.decoder
        self._shift, self._scale = (each.numpy(force=True) for each in (scale.mean, scale.std))
        self.action_space = gym.spaces.Box(-1, 1, (space.size,), np.float32)
        if space.discrete:
            self.action_space = gym.spaces.Discrete(space.size)
        shown: Any = env.observation_space
        numbers = (self._spec.state_size + len(self._spec.words),)
        self._shape = shown["pixels"].shape
        spaces: dict[str, gym.Space] = {}
        if policy.uses_frames:  # flat, so that nobody changes their layout
            size = (self._keep * int(np.prod(self._shape)),)
            spaces["frames"] = gym.spaces.Box(0, 255, size, np.uint8)
        if numbers[0]:
            spaces["numbers"] = gym.spaces.Box(-np.inf, np.inf, numbers, np.float32)
        self.observation_space = gym.spaces.Dict(spaces)
        self.latest: dict[str, np.ndarray] = {}
        """Observation of the environment."""
        self._frames: list[np.ndarray] = []
        self._words = np.zeros(0, np.float32)
        self._steps, self._return, self._success = 0, 0.0, False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Begin the next episode."""
        observation, info = self.env.reset(seed=int(self._random.integers(2**31)), options=options)
        self._words = np.asarray(count_words(info["task"], self._spec.words), np.float32)
        self._frames = [observation["pixels"]] * self._keep
        self._steps, self._return, self._success = 0, 0.0, False
        return self._observed(observation), info

    def step(self, action: Any) -> Any:
        """Take a class, or normalized numbers; the last info of an episode has its `return` and `success`."""
        taken = self._values[int(action)] if self._values else action * self._scale + self._shift
        observation, reward, terminated, truncated, info = self.env.step(taken)
        self._frames = [*self._frames, observation["pixels"]][-self._keep :]
        self._steps, self._return = self._steps + 1, self._return + float(reward)
        self._success |= info.get("is_success", False)
        truncated = truncated or self._steps == self._limit
        ended = {"return": self._return, "success": self._success} if terminated or truncated else {}
        return self._observed(observation), float(reward), terminated, truncated, ended

    def _observed(self, observation: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.latest = observation
        state = observation["agent_pos"] if self._spec.state_size else np.zeros(0, np.float32)
        seen = {
            "frames": np.concatenate([frame.ravel() for frame in self._frames]),
            "numbers": np.concatenate([state, self._words]).astype(np.float32),
        }
        return {key: seen[key] for key in self.observation_space.spaces}  # type: ignore[attr-defined]


class _Sight(nn.Module):
    """Inputs of the actor and the critic: the decoder's input or the scores of actions, and the features."""

    def __init__(self, policy: NetworkPolicy, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.policy, self.shape = policy, shape

    def forward(self, observation: dict[str, Tensor]) -> tuple[Float[Tensor, "b f"], Float[Tensor, "b d"]]:
        """Return both.

        Args:
            observation: of `ObservedEnv`, a batch.
        """
        policy, spec = self.policy, self.policy.spec
        count = len(next(iter(observation.values())))
        frames = torch.zeros(count, 0)
        if policy.uses_frames:
            frames = observation["frames"].to(torch.uint8).view(count, -1, *self.shape).permute(0, 1, 4, 2, 3)
        numbers = observation.get("numbers", torch.zeros(count, 0))
        state = numbers[:, : spec.state_size] if spec.state_size else None
        features = policy.features(frames, state, numbers[:, spec.state_size :])
        out = policy.head(features)
        if policy.decoder is None:
            return out, features
        latent = policy.decoder_input(out[:, None])[:, 0]
        if policy.decoder.config.use_state:
            latent = torch.cat([latent, policy.normal_state(state)], dim=1)
        return latent, features


class _Frozen(VecEnvWrapper):
    """Environments that return policy features instead of raw observations."""

    def __init__(self, envs: DummyVecEnv, sight: _Sight) -> None:
        self._sight = sight
        size = sum(part.shape[1] for part in self._seen(envs.reset()))
        spaces: dict[str, gym.Space] = {"seen": gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)}
        super().__init__(envs, observation_space=gym.spaces.Dict(spaces))

    def reset(self) -> Any:
        """Begin the first episodes."""
        return {"seen": np.concatenate(self._seen(self.venv.reset()), axis=1)}

    def step_wait(self) -> Any:
        """Return the step results, with features also for the last observation of a cut episode."""
        observations, rewards, dones, infos = self.venv.step_wait()
        for info in infos:
            if last := info.get("terminal_observation"):
                one = {key: value[None] for key, value in last.items()}
                info["terminal_observation"] = {"seen": np.concatenate(self._seen(one), axis=1)[0]}
        return {"seen": np.concatenate(self._seen(observations), axis=1)}, rewards, dones, infos

    @torch.no_grad()
    def _seen(self, observations: Any) -> list[np.ndarray]:
        parts = self._sight({key: torch.from_numpy(value) for key, value in observations.items()})
        return [part.numpy() for part in parts]


class _Extractor(BaseFeaturesExtractor):
    """Observations to one vector: the actor's part, then the critic's."""

    def __init__(self, space: gym.Space, sight: _Sight | None, size: int) -> None:
        super().__init__(space, size)
        self.sight = sight

    def forward(self, observations: Any) -> Tensor:
        """Return the vector, which a frozen policy has computed already."""
        return observations["seen"] if self.sight is None else torch.cat(self.sight(observations), dim=1)


class _Actor(nn.Module):
    """The actor's part to scores of actions: through the decoder, if there is one."""

    def __init__(self, policy: NetworkPolicy, size: int) -> None:
        super().__init__()
        self.decoder, self.size = policy.decoder, size
        self.state_size = policy.spec.state_size if policy.decoder and policy.decoder.config.use_state else 0

    def forward(self, seen: Float[Tensor, "b f"]) -> Float[Tensor, "b a"]:
        """Return logits, or normalized numbers."""
        seen = seen[:, : self.size]
        if self.decoder is None:
            return seen
        latent, state = seen[:, : self.size - self.state_size], seen[:, self.size - self.state_size :]
        state = state if self.state_size else None
        decode = self.decoder.mix if self.decoder.config.mixture else self.decoder
        return decode(latent[:, None], state)[:, 0]


class _Critic(nn.Module):
    """The critic's part to the value."""

    def __init__(self, skip: int, size: int) -> None:
        super().__init__()
        self.skip, self.net = skip, nn.Sequential(nn.Linear(size, 128), nn.ReLU(), nn.Linear(128, 1))

    def forward(self, seen: Float[Tensor, "b f"]) -> Float[Tensor, "b 1"]:
        """Return the value."""
        return self.net(seen[:, self.skip :])


class _Log(BaseCallback):
    """Writes a row per rollout."""

    def __init__(self, file: Any, progress: Progress) -> None:
        super().__init__()
        self._file, self._log, self._progress, self._before = file, csv.writer(file), progress, 0
        self._log.writerow(COLUMNS)
        self._ended: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        self._ended += [info for info in self.locals["infos"] if "return" in info]
        return True

    def _on_rollout_end(self) -> None:
        means = [
            f"{np.mean([e[key] for e in self._ended]):.5g}" if self._ended else ""
            for key in ("return", "success")
        ]
        self._log.writerow([self.num_timesteps, *means, len(self._ended)])
        self._file.flush()
        self._ended = []
        self._progress.advance(self.num_timesteps - self._before)
        self._before = self.num_timesteps


def train_ppo(
    policy: NetworkPolicy,
    make_env: Callable[[int], ObservedEnv],
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
        make_env: number -> one of the environments in which it acts side by side.
        settings: `OnlineConfig`.
        steps: environment steps.
        lr: learning rate at the beginning; it falls to 0 linearly.
        frozen: whether only the decoder learns.
        seed: random seed.
        name: of the run, for progress.
        metrics: CSV file with return and success by step.
        critic: file of the weights of the critic to start with; None: random ones.
    """
    torch.manual_seed(seed)
    policy.eval()
    envs: Any = DummyVecEnv([lambda number=number: make_env(number) for number in range(settings.envs)])
    sight = _Sight(policy, envs.envs[0]._shape)
    with torch.no_grad():
        first = {key: torch.from_numpy(value) for key, value in envs.reset().items()}
        acts, sees = (part.shape[1] for part in sight(first))
    if frozen:
        envs = _Frozen(envs, sight)
    envs = VecNormalize(envs, norm_obs=False, gamma=settings.gamma)
    part = settings.envs * settings.rollout_steps / steps  # `left` is what remains after a rollout
    ppo = PPO(
        "MultiInputPolicy",
        envs,
        n_steps=settings.rollout_steps,
        batch_size=min(settings.batch_size, settings.envs * settings.rollout_steps),
        n_epochs=settings.epochs,
        learning_rate=lambda left: lr * min(1.0, left + part),
        gamma=settings.gamma,
        gae_lambda=settings.gae_lambda,
        ent_coef=settings.entropy,
        seed=seed,
        device="cpu",
        policy_kwargs={
            "features_extractor_class": _Extractor,
            "features_extractor_kwargs": {"sight": None if frozen else sight, "size": acts + sees},
            "net_arch": [],
            "ortho_init": False,
            "normalize_images": False,
        },
    )
    both: Any = ppo.policy
    both.action_net, both.value_net = _Actor(policy, acts), _Critic(acts, sees)
    if critic is not None:
        load_weights(both.value_net, load_tensors(critic), critic)
    both.optimizer = torch.optim.Adam(both.parameters(), lr=lr, eps=1e-5)
    metrics.parent.mkdir(parents=True, exist_ok=True)
    with metrics.open("w", newline="") as file, Progress(name, steps, "steps") as progress:
        ppo.learn(steps, callback=_Log(file, progress))
    envs.close()
    policy.eval()
    return {key: value.detach().clone() for key, value in both.value_net.state_dict().items()}


def from_scratch(policy: NetworkPolicy) -> NetworkPolicy:
    """Return a policy of the same network with random weights, for the same robot actions.

    Args:
        policy: a grounded latent policy.
    """
    spec, config = policy.spec, policy.config.behavior_cloning()
    fresh = config.build(replace(spec, target=robot_action_target(spec.action_space, config.kind)))
    own = fresh.state_dict()
    own |= {key: value for key, value in policy.state_dict().items() if key.startswith("state_")}
    fresh.load_state_dict(own)
    return fresh  # type: ignore[return-value]
