"""`ground mode=online`: learn latent action -> robot action by acting (LAPO, arXiv 2312.10812, stage 3).

The latent policy is frozen, and its decoder learns from the environment's reward with PPO;
`online.finetune_steps` then trains both. With `online.lam`, the decoder first learns from pairs of random
actions and the latent actions of the resulting transitions, which need no labels. A policy of the same
network, trained from scratch by PPO for as many steps, is always the baseline. Unlike LAPO, the pairs are
used only before PPO, and fine-tuning replaces the second head.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from latentact.config import Between, Count, Limit, OneOf, Seed, check_bounds
from latentact.data.samples import LabeledRows
from latentact.envs.checks import check_compatible, check_ranges, check_step_limit, try_step
from latentact.envs.distract import Distraction
from latentact.envs.spec import ENVS, VIEWS, EnvSpec, env_spec, make_env, make_expert
from latentact.errors import UserError, missing_extra, require_one_of
from latentact.evaluation.policy.rollout import rollout as roll_out
from latentact.evaluation.policy.rollout import save_rollout
from latentact.io.atomic import read_object
from latentact.io.tensors import save_tensors
from latentact.lams.contract import LatentActionModel, load_lam
from latentact.learners.contract import score
from latentact.policies.contract import Policy
from latentact.policies.decoder import ActionDecoder
from latentact.policies.network import NetworkPolicy
from latentact.policies.selection import SELECTIONS, Selection
from latentact.stages import rollout
from latentact.types import ActionSpace

log = logging.getLogger(__name__)

CRITIC = "critic.safetensors"
SMALL = 0.01
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
    """Learning rate at the beginning; it falls to 0 linearly."""
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
        UserError: PPO cannot train the policy's decoder there.
    """
    if not config.env:
        raise UserError("online.env must be set for mode=online, got none. Give an environment to act in.")
    if importlib.util.find_spec("stable_baselines3") is None:
        raise missing_extra("stable_baselines3", "gail")
    chunk = policy.config.network.chunk_size
    if not isinstance(policy, NetworkPolicy) or policy.spec.stride != 1 or chunk != 1:
        raise UserError(
            f"mode=online needs policy=latent with one latent action per environment step, got {source} "
            f"with policy={policy.config.kind}, {policy.spec.stride} steps per latent action and "
            f"policy.network.chunk_size={chunk}. Train one with frame_gap_s=0 and chunk_size=1."
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
        low, high = _bounds(config)
        if not np.isfinite([low, high]).all():
            raise UserError(
                f"mode=online needs finite bounds of actions, got those of {config.env}. Use others."
            )
    return env


def load_own_lam(config: OnlineConfig, policy: Policy) -> LatentActionModel | None:
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
            f"{config.lam} with {lam.spec.weights}. Give that one."
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
    from latentact.training.ppo import ObservedEnv, from_scratch, train_ppo

    assert isinstance(policy, NetworkPolicy)
    assert policy.decoder is not None

    def observed(learner: NetworkPolicy, number: int) -> ObservedEnv:
        env = make_env(config.env, view=config.view, frames=learner.uses_frames or lam is not None)
        return ObservedEnv(env, learner, config.max_steps, (seed, number))

    def train(learner: NetworkPolicy, name: str, steps: int, lr: float, **more: Any) -> Any:
        make, metrics = functools.partial(observed, learner), out / f"{name}.csv"
        return train_ppo(
            learner, make, config, steps=steps, lr=lr, seed=seed, name=name, metrics=metrics, **more
        )

    _spread(config, policy.decoder)
    _shrink(policy.decoder.net[-1])
    folders: dict[str, Path] = {}
    if lam is not None:
        folders["paired"] = out / "paired"
        if not (folders["paired"] / "config.json").exists():
            env = observed(policy, config.envs)  # a number that no environment of PPO has
            fit(policy.decoder, random_play(env, policy, lam, config.play_steps, seed), out)
            policy.cpu().save_pretrained(folders["paired"])
        policy = Policy.from_pretrained(folders["paired"])
        assert isinstance(policy, NetworkPolicy)
    folders["decoder"] = out
    if not (out / "config.json").exists():
        critic = train(policy, "decoder", config.steps, config.lr, frozen=True)
        save_tensors(out / CRITIC, critic)
        policy.write(out)
    if config.finetune_steps:
        folders["finetuned"] = out / "finetuned"
        if not (folders["finetuned"] / "config.json").exists():
            tuned: Any = Policy.from_pretrained(out)
            steps, lr = config.finetune_steps, config.finetune_lr
            train(tuned, "finetuned", steps, lr, frozen=False, critic=out / CRITIC)
            tuned.save_pretrained(folders["finetuned"])
    folders["scratch"] = out / "scratch"
    total = config.steps + config.finetune_steps + (config.play_steps if lam else 0)
    if not (folders["scratch"] / "config.json").exists():
        torch.manual_seed(seed)
        scratch = from_scratch(policy)
        _spread(config, scratch)
        _shrink(scratch.head)
        train(scratch, "scratch", total, config.finetune_lr, frozen=False)
        scratch.save_pretrained(folders["scratch"])
    rows = {name: _evaluate(config, folder, out / "rollouts" / name) for name, folder in folders.items()}
    if expert := _expert(config, out / "rollouts" / "expert"):
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
    compared = "no better and no worse than"
    if own.above(scratch) or scratch.above(own):
        compared = "better than" if own.above(scratch) else "worse than"
    scores = [f"{ROWS[name]} {score([row])}" for name, row in rows.items()]
    return (
        f"The latent policy is {compared} PPO from scratch after {steps} environment steps each; "
        f"{own.name}: {', '.join(scores)}."
    )


@torch.no_grad()
def random_play(
    env: Any, policy: NetworkPolicy, lam: LatentActionModel, steps: int, seed: int
) -> LabeledRows:
    """Return random actions with the latent actions of what they did, as inputs of the policy's decoder.

    Args:
        env: an `ObservedEnv`.
        policy: latent policy with a decoder.
        lam: its LAM.
        steps: actions to take.
        seed: of the actions.
    """
    env.action_space.seed(seed)
    inputs, states, actions = [], [], []
    frames: list[np.ndarray] = []
    seen: list[np.ndarray] = []
    ended = True
    for step in range(steps + 1):
        if ended or step == steps:
            if frames:
                clip = torch.from_numpy(np.stack([*frames, env.latest["pixels"]])).permute(0, 3, 1, 2)
                held = torch.from_numpy(np.stack([*seen, _state(env)]))
                latents = lam.encode(clip, states=held if lam.state_size else None)
                column = getattr(latents, policy.targets.column)[0]
                inputs.append(policy.normal_latent(column.flatten(1)))
                states.append(held[:-1])
            if step == steps:
                break
            frames, seen = [], []
            env.reset()
        frames.append(env.latest["pixels"])
        seen.append(_state(env))
        actions.append(env.action_space.sample())
        _, _, terminated, truncated, _ = env.step(actions[-1])
        ended = terminated or truncated
    env.close()
    taken = torch.from_numpy(np.stack(actions))
    assert policy.decoder is not None
    if not policy.decoder.space.discrete:
        taken = policy.decoder.unnormalize(taken)
    state = policy.normal_state(torch.cat(states)) if policy.spec.state_size else None
    return LabeledRows(torch.cat(inputs), state, taken[:, None])


def _state(env: Any) -> np.ndarray:
    return np.asarray(env.latest.get("agent_pos", ()), np.float32)


def _bounds(config: OnlineConfig) -> tuple[np.ndarray, np.ndarray]:
    env: Any = make_env(config.env, view=config.view)
    low, high = env.action_space.low, env.action_space.high
    env.close()
    return low, high


def _spread(config: OnlineConfig, scale: Any) -> None:
    """Scale continuous actions so that their bounds map to -1 and 1.

    Args:
        config: settings.
        scale: decoder, or policy without one, with mean and deviation of actions.
    """
    space: ActionSpace = scale.space if hasattr(scale, "space") else scale.spec.action_space
    if not space.discrete:
        low, high = (torch.from_numpy(bound) for bound in _bounds(config))
        scale.mean.copy_((low + high) / 2)
        scale.std.copy_((high - low) / 2)


@torch.no_grad()
def _shrink(layer: Any) -> None:
    layer.weight.mul_(SMALL)
    layer.bias.zero_()


def _evaluate(config: OnlineConfig, policy: Path, out: Path) -> dict[str, Any]:
    settings = rollout.RolloutConfig(
        policy=str(policy),
        env=config.env,
        out=str(out),
        episodes=config.episodes,
        seed=config.eval_seed,
        view=config.view,
        max_steps=config.max_steps,
        record=0,
        action_selection=config.action_selection,
    )
    return rollout.run(settings)


def _expert(config: OnlineConfig, out: Path) -> dict[str, Any] | None:
    """Return the rollout of the environment's expert on the same seeds; None without one."""
    if not (out / "rollout.json").exists():
        env = make_env(config.env, view=config.view)
        env.reset(seed=config.eval_seed)
        try:
            make_expert(config.env, env, config.eval_seed)
        except UserError:  # it has none; what fails later is an error
            return None
        finally:
            env.close()
        played = roll_out(
            None,
            config.env,
            episodes=config.episodes,
            seed=config.eval_seed,
            view=config.view,
            max_steps=config.max_steps,
        )
        save_rollout(played, out)
    return read_object(out / "rollout.json")
