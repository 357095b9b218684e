"""`ground mode=online`: learn latent action -> robot action by acting (LAPO, arXiv 2312.10812, stage 3).

The latent policy is frozen, and its decoder learns from the environment's reward with PPO;
`online.finetune_steps` then trains both. With `online.lam`, the decoder first learns from pairs of random
actions and the latent actions of the resulting transitions, which need no labels. A policy of the same
network, trained from scratch by PPO for as many steps, is always the baseline. Unlike LAPO, the pairs are
used only before PPO, and fine-tuning replaces the second head.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from latentact.agents.agent import to_env_actions
from latentact.config import Between, Count, Limit, OneOf, Seed, check_bounds
from latentact.data.samples import LabeledRows
from latentact.envs.boundary import import_gymnasium
from latentact.envs.checks import check_compatible, check_ranges, check_step_limit, try_step
from latentact.envs.distract import Distraction
from latentact.envs.episode import run_episodes
from latentact.envs.spec import ENVS, VIEWS, EnvSpec, env_spec, make_env
from latentact.errors import UserError, missing_extra, require_one_of
from latentact.io.tensors import save_tensors
from latentact.lams.contract import LatentActionModel, load_lam
from latentact.learners.contract import compare_scores, score
from latentact.policies.contract import Policy
from latentact.policies.decoder import ActionDecoder
from latentact.policies.selection import SELECTIONS, Selection
from latentact.stages.rollout import evaluate, evaluate_expert
from latentact.types import ActionSpace

log = logging.getLogger(__name__)

CRITIC = "critic.safetensors"
OUTPUT_LAYER_SCALE = 0.01
"""Factor of the weights of the layer that outputs actions, so that PPO starts with a nearly uniform action
distribution."""
ROWS = {
    "paired": "the decoder on random play",
    "decoder": "the decoder",
    "finetuned": "fine-tuned",
    "scratch": "PPO from scratch",
    "expert": "the expert",
}


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """Settings of PPO on the decoder of a latent policy."""

    env: Annotated[str, OneOf(ENVS)] = ""
    """Environment to act in; needed for mode=online."""
    view: Annotated[str, OneOf(VIEWS)] = "agent"
    """agent or full."""
    max_steps: Limit = 0
    """Steps after which an episode ends; 0: the environment's own limit."""
    lam: str = ""
    """Folder of the LAM: the decoder first learns from random actions and their latent actions; empty: skip
    this step."""
    play_steps: Count = 10_000
    """lam: environment steps of random actions."""
    steps: Count = 50_000
    """Environment steps of PPO on the decoder, with the latent policy frozen."""
    lr: Annotated[float, Between(0, 1)] = 1e-3
    """Initial learning rate, decayed linearly to 0."""
    finetune_steps: Limit = 0
    """Environment steps of PPO on policy and decoder afterwards; 0: none."""
    finetune_lr: Annotated[float, Between(0, 1)] = 1e-3
    """Learning rate of those steps, and of PPO from scratch."""
    envs: Annotated[int, Between(1, 256)] = 16
    """Number of parallel environments."""
    rollout_steps: Annotated[int, Between(2, 10**6)] = 32
    """Steps per environment between updates."""
    batch_size: Annotated[int, Between(2, 10**6)] = 256
    """Steps per gradient step."""
    epochs: Annotated[int, Between(1, 1000)] = 4
    """Passes over the steps of a rollout."""
    gamma: Annotated[float, Between(0, 1)] = 0.99
    """Discount of rewards."""
    gae_lambda: Annotated[float, Between(0, 1)] = 0.95
    """Decay of generalized advantage estimation."""
    entropy: Annotated[float, Between(0, 100)] = 0.01
    """Weight of the entropy bonus."""
    episodes: Count = 100
    """Evaluation episodes of every row."""
    eval_seed: Seed = 100_000
    """Reset seed of the first evaluation episode."""
    action_selection: Selection = "sample"
    """Discrete actions in the evaluation: greedy or sample."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        require_one_of("online.view", self.view, VIEWS)
        require_one_of("online.action_selection", self.action_selection, SELECTIONS)
        check_ranges(episodes=self.episodes, seed=self.eval_seed, max_steps=self.max_steps)
        check_bounds(self, "online.")


def check_online(config: OnlineConfig, policy: Policy, source: str) -> EnvSpec:
    """Return the environment's specification.

    Args:
        config: settings.
        policy: latent policy.
        source: its folder, for messages.

    Raises:
        UserError: PPO cannot train the policy's decoder in the environment, or stable-baselines3 is missing.
    """
    if not config.env:
        raise UserError("online.env must be set for mode=online, got none. Give one, as in online.env=pusht.")
    if importlib.util.find_spec("stable_baselines3") is None:
        raise missing_extra("stable_baselines3", "gail")
    names = ("action_scores", "actions")
    if own := [name for name in names if getattr(type(policy), name) is not getattr(Policy, name)]:
        raise UserError(
            "mode=online needs a policy whose actions are selected from the outputs of `forward`, which PPO "
            f"trains, got {source}, which overrides {' and '.join(own)}. Use mode=offline."
        )
    stride, chunk_size = policy.spec.stride, policy.config.network.chunk_size
    if (stride, chunk_size) != (1, 1):
        raise UserError(
            f"mode=online needs a policy with one latent action per environment step, got {source} with "
            f"{stride} steps per latent action and policy.network.chunk_size={chunk_size}. Train the LAM "
            "with frame_gap_s=0, label with it, and train the policy with policy.network.chunk_size=1."
        )
    env = env_spec(config.env, view=config.view)
    check_step_limit(env, config.max_steps)
    check_compatible(
        env,
        source,
        actions=env.action_space,
        cameras=(policy.spec.camera,) if policy.uses_frames else (),
        channels=policy.spec.channels,
        state_size=policy.spec.state_size,
    )
    try_step(config.env, view=config.view, distract=Distraction(), seed=config.eval_seed)
    if not env.action_space.discrete:
        low, high = _action_bounds(config)
        if not np.isfinite([low, high]).all():
            raise UserError(
                f"the actions of {config.env} must have finite bounds for mode=online, got {low.tolist()} to "
                f"{high.tolist()}. Choose an environment with bounded or discrete actions."
            )
    return env


def load_matching_lam(config: OnlineConfig, policy: Policy) -> LatentActionModel | None:
    """Return the LAM of `online.lam`; None without.

    Raises:
        UserError: it is not the one whose latent actions the policy predicts.
    """
    if not config.lam:
        return None
    lam = load_lam(config.lam)
    assert policy.latent is not None
    if lam.spec.weights != policy.latent.weights:
        raise UserError(
            f"online.lam must be the LAM of the policy's labels, with weights {policy.latent.weights}, got "
            f"{config.lam} with {lam.spec.weights}. Give the LAM that made the policy's labels."
        )
    return lam


def ground_online(
    config: OnlineConfig,
    policy: Policy,
    lam: LatentActionModel | None,
    fit: Callable[[ActionDecoder, LabeledRows, Path], None],
    seed: int,
    out: Path,
) -> dict[str, Any]:
    """Train the decoder, then all of it if configured, and PPO from scratch; evaluate; return the result.

    What was finished before an interruption is kept; PPO itself starts again, with the same result.

    Args:
        config: settings.
        policy: latent policy with a new decoder.
        lam: its LAM, or None.
        fit: trains a decoder on pairs, with checkpoints in a folder.
        seed: random seed.
        out: run folder.
    """
    from latentact.learners.ppo.environment import PolicyEnv
    from latentact.learners.ppo.online import from_scratch, train_online

    def train(trained: Policy, name: str, steps: int, lr: float, **more: Any) -> Any:
        def make(number: int) -> PolicyEnv:
            env = make_env(config.env, view=config.view, frames=trained.uses_frames)
            return PolicyEnv(env, trained, max_steps=config.max_steps, seed=(seed, number))

        metrics = out / f"{name}.csv"
        return train_online(
            trained, make, config, steps=steps, lr=lr, seed=seed, name=name, metrics=metrics, **more
        )

    assert policy.decoder is not None
    _scale_actions_to_bounds(config, policy.decoder, policy.decoder.space)
    _shrink_output_layer(policy.decoder)
    folders: dict[str, Path] = {}
    if lam is not None:
        folders["paired"] = out / "paired"
        if not (folders["paired"] / "config.json").exists():
            fit(policy.decoder, random_play(config, policy, lam, seed), out)
            policy.cpu().save_pretrained(folders["paired"])
        policy = Policy.from_pretrained(folders["paired"])
    folders["decoder"] = out
    if not (out / "config.json").exists():
        critic = train(policy, "decoder", config.steps, config.lr, frozen=True)
        save_tensors(out / CRITIC, critic)
        policy.write(out)
    if config.finetune_steps:
        folders["finetuned"] = out / "finetuned"
        if not (folders["finetuned"] / "config.json").exists():
            tuned = Policy.from_pretrained(out)
            steps, lr = config.finetune_steps, config.finetune_lr
            train(tuned, "finetuned", steps, lr, frozen=False, critic=out / CRITIC)
            tuned.save_pretrained(folders["finetuned"])
    folders["scratch"] = out / "scratch"
    total = config.steps + config.finetune_steps + (config.play_steps if lam else 0)
    if not (folders["scratch"] / "config.json").exists():
        torch.manual_seed(seed)
        scratch = from_scratch(policy)
        assert scratch.spec.action_space is not None
        _scale_actions_to_bounds(config, scratch, scratch.spec.action_space)
        _shrink_output_layer(scratch)
        train(scratch, "scratch", total, config.finetune_lr, frozen=False)
        scratch.save_pretrained(folders["scratch"])
    rows = {
        name: evaluate(config, folder, out / "rollouts" / name, record=0) for name, folder in folders.items()
    }
    if expert := evaluate_expert(config, out / "rollouts" / "expert"):
        rows["expert"] = expert
    verdict = _verdict(rows, total)
    log.info(verdict)
    keep = ("success", "ci95", "return", "return_ci95", "episodes")
    return {
        "mode": "online",
        "env": config.env,
        "environment_steps": total,
        "verdict": verdict,
        "rows": {name: {key: row[key] for key in keep} for name, row in rows.items()},
    }


def _verdict(rows: dict[str, dict[str, Any]], steps: int) -> str:
    """Return a comparison with PPO from scratch and the scores of all rows."""
    own, scratch = (score([row]) for row in (rows.get("finetuned", rows["decoder"]), rows["scratch"]))
    scores = [f"{ROWS[name]} {score([row])}" for name, row in rows.items()]
    return (
        f"The latent policy is {compare_scores(own, scratch)} PPO from scratch after {steps} environment "
        f"steps each; {own.name}: {', '.join(scores)}."
    )


class _RandomActor:
    """Draws the actions of one episode after the other uniformly, as a decoder can output them.

    Args:
        decoder: the decoder.
        seed: seed of the actions.

    Attributes:
        actions: the actions so far: class indices, or float32 ``[a]`` in the environment's units.
    """

    def __init__(self, decoder: ActionDecoder, seed: int) -> None:
        spaces = import_gymnasium().spaces
        self._decoder, size = decoder, decoder.space.size
        self._space = (
            spaces.Discrete(size) if decoder.space.discrete else spaces.Box(-1, 1, (size,), np.float32)
        )
        self._space.seed(seed)
        self.actions: list[Any] = []

    def reset(self, num_envs: int) -> None:
        """Begin the next episode."""

    def act(self, observation: dict[str, Any]) -> Any:
        """Return an action, ``[1]`` or ``[1, a]``."""
        action = self._space.sample()
        if not self._decoder.space.discrete:
            action = self._decoder.unnormalize(torch.from_numpy(action)).numpy()
        self.actions.append(action)
        return to_env_actions(self._decoder.space, np.stack([action]))


@torch.no_grad()
def random_play(config: OnlineConfig, policy: Policy, lam: LatentActionModel, seed: int) -> LabeledRows:
    """Take `play_steps` random actions; return them with the latent actions of their transitions.

    Args:
        config: settings.
        policy: latent policy with a decoder, whose inputs the latent actions become.
        lam: its LAM.
        seed: random seed.

    Raises:
        EnvError: the environment failed.
    """
    assert policy.decoder is not None
    env, spec = make_env(config.env, view=config.view), env_spec(config.env, view=config.view)
    # PPO's environments have the numbers below `envs`.
    actor, reset_seeds = _RandomActor(policy.decoder, seed), np.random.default_rng((seed, config.envs))
    inputs, states = [], []
    while left := config.play_steps - len(actor.actions):
        frames: list[np.ndarray] = []
        (episode,) = run_episodes(
            actor,
            [env],
            [int(reset_seeds.integers(2**31))],
            camera=spec.camera,
            max_steps=min(left, config.max_steps or left),
            frames=[frames],
            record=("states",) if spec.state_names else (),
        )
        if episode.error:
            raise episode.error
        clip = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
        state = torch.from_numpy(np.stack(episode.states)) if spec.state_names else None
        latents = getattr(lam.encode(clip, states=state if lam.state_size else None), policy.targets.column)
        inputs.append(policy.normal_latent(latents[0].flatten(1)))
        if state is not None and policy.spec.state_size:
            states.append(policy.normal_state(state[:-1]))
    env.close()
    actions = torch.from_numpy(np.stack(actor.actions))
    return LabeledRows(torch.cat(inputs), torch.cat(states) if states else None, actions[:, None])


def _action_bounds(config: OnlineConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest and largest continuous action, ``[a]`` each."""
    env: Any = make_env(config.env, view=config.view)
    low, high = env.action_space.low, env.action_space.high
    env.close()
    return low, high


def _scale_actions_to_bounds(
    config: OnlineConfig, module: ActionDecoder | Policy, actions: ActionSpace
) -> None:
    """Set mean and deviation of a module's continuous actions so that the bounds are -1 and 1."""
    if not actions.discrete:
        low, high = (torch.from_numpy(bound) for bound in _action_bounds(config))
        module.mean.copy_((low + high) / 2)
        module.std.copy_((high - low) / 2)


@torch.no_grad()
def _shrink_output_layer(module: ActionDecoder | Policy) -> None:
    """Scale the weights of a module's last layer down and set its bias to 0, if it has a linear one."""
    if (layer := module.output_layer) is not None:
        layer.weight.mul_(OUTPUT_LAYER_SCALE)
        if layer.bias is not None:
            layer.bias.zero_()
