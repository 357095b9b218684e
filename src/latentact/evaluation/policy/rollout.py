"""Roll an agent out in an environment, with the environment's own success, and write `rollout.json`.

Episode i starts from reset seed `seed + i`, so two policies are evaluated on the same episodes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latentact.envs.checks import check_ranges, check_step_limit
from latentact.envs.distract import Distraction
from latentact.envs.episode import Actor, Episode, ExpertActor, run_episodes
from latentact.envs.spec import EnvError, env_spec, make_env
from latentact.errors import UserError
from latentact.evaluation.policy.intervals import mean_interval, success_interval
from latentact.io.atomic import write_json
from latentact.io.video_writer import write_video

log = logging.getLogger(__name__)

PARTIAL = "partial.json"
"""File with the episodes before an error, in the format of `rollout.json`."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """The results of e episodes."""

    env: str
    """Name of the environment."""
    seed: int
    """Reset seed of the first episode."""
    fps: int
    """Steps per second."""
    successes: np.ndarray | None
    """bool `[e]`: the task succeeded at some step; None if the environment never reports success."""
    returns: np.ndarray
    """float64 `[e]`: sum of rewards."""
    max_rewards: np.ndarray
    """float64 `[e]`: largest reward."""
    lengths: np.ndarray
    """int64 `[e]`: number of steps."""
    videos: list[np.ndarray]
    """uint8 `[t, h, w, 3]` each: frames of the first episodes, as observed by the policy."""
    seconds: float = 0.0
    """Wall-clock duration of all episodes, in seconds."""

    @property
    def success(self) -> float | None:
        """Fraction of successful episodes."""
        return None if self.successes is None else float(self.successes.mean())


class RolloutStoppedError(EnvError):
    """The environment failed in an episode; `finished` holds the episodes before it, or None."""

    def __init__(self, message: str, finished: Rollout | None) -> None:
        super().__init__(message)
        self.finished = finished


def rollout(
    actor: Actor | None,
    env_name: str,
    *,
    episodes: int,
    seed: int,
    resolution: int = 0,
    view: str = "agent",
    distract: Distraction | None = None,
    frames: bool = True,
    max_steps: int = 0,
    record: int = 0,
    num_envs: int = 64,
    latency: int = 0,
    action_noise: float = 0.0,
) -> Rollout:
    """Run `actor` for a number of episodes.

    Args:
        actor: the agent; None: the environment's expert.
        env_name: as for `make_env`.
        episodes: number of episodes.
        seed: episode i uses reset seed `seed + i`.
        resolution: height and width of the frames in pixels; 0: the environment's own.
        view: see `make_env`.
        distract: see `make_env`.
        frames: False: the actor gets black frames, which cost no time, except where they are recorded.
        max_steps: steps after which an episode ends; 0: the environment's own limit.
        record: number of episodes, from the first, whose frames are kept.
        num_envs: episodes run in parallel; affects speed only.
        latency: steps from an observation to the action that answers it; see `Disturbed`.
        action_noise: standard deviation of noise on continuous actions, relative to half their range.

    Raises:
        UserError: the environment is unknown, a number is out of range, or episodes have no step limit.
        RolloutStoppedError: the environment failed; holds the episodes before that.
    """
    check_ranges(episodes=episodes, seed=seed, max_steps=max_steps, record=record)
    if num_envs < 1:
        raise UserError(f"num_envs must be at least 1, got {num_envs}.")
    spec = env_spec(env_name, view=view)
    check_step_limit(spec, max_steps)
    start = time.monotonic()
    groups = np.array_split(np.arange(episodes), -(-episodes // num_envs))
    envs = [make_env(env_name, resolution=resolution, view=view, distract=distract) for _ in groups[0]]
    ranges = _action_ranges(envs[0], env_name) if action_noise else None
    finished: list[Episode] = []
    videos: list[list[np.ndarray]] = [[] for _ in range(min(record, episodes))]
    error = None
    draws = frames and actor is not None
    for group in groups:
        seeds, used = (seed + group).tolist(), envs[: len(group)]
        for env, number in zip(used, group, strict=True):
            env.draw(draws or bool(number < record))  # type: ignore[attr-defined]
        acts = actor or ExpertActor(env_name, used, seeds)
        if latency or action_noise:
            acts = Disturbed(acts, seeds, latency, spec.hold, action_noise, ranges)
        played = run_episodes(
            acts,
            used,
            seeds,
            camera=spec.camera,
            max_steps=max_steps,
            frames=videos[group[0] : group[-1] + 1],
        )
        finished += [episode for episode in played if episode.error is None]
        log.info("%s: %d/%d episodes", env_name, len(finished), episodes)
        if error := played[-1].error:
            break
    for env in envs:
        env.close()
    result = None
    if finished:
        reported = any(episode.success is not None for episode in finished)
        result = Rollout(
            env=env_name,
            seed=seed,
            fps=spec.fps,
            successes=np.array([bool(episode.success) for episode in finished]) if reported else None,
            returns=np.array([episode.total_reward for episode in finished]),
            max_rewards=np.array([max(episode.rewards, default=0.0) for episode in finished]),
            lengths=np.array([episode.steps for episode in finished]),
            videos=[np.stack(frames) for frames in videos[: len(finished)]],
            seconds=time.monotonic() - start,
        )
    if error:
        raise RolloutStoppedError(str(error), result) from error
    assert result is not None
    return result


class Disturbed:
    """An actor whose actions arrive late and with noise, as on a real robot.

    Args:
        actor: what acts.
        seeds: of the episodes, and of the noise on the actions of each.
        latency: steps by which actions arrive late. Until the first one arrives, `hold` is executed, or, if
            there is none, the first action.
        hold: no-op action, if there is one.
        noise: standard deviation of the noise, relative to half the range of each dimension.
        ranges: minimum and maximum of each dimension of an action, ``[2, a]``; None without noise.
    """

    def __init__(
        self,
        actor: Actor,
        seeds: Sequence[int],
        latency: int,
        hold: int | None,
        noise: float,
        ranges: np.ndarray | None,
    ) -> None:
        self._actor, self._latency, self._hold = actor, latency, hold
        self._noise, self._ranges = noise, ranges
        self._rngs = [np.random.default_rng((seed, 4)) for seed in seeds]
        self._sent: list[Any] = []

    def reset(self, num_envs: int) -> None:
        """Reset the actor for a batch of new episodes."""
        self._actor.reset(num_envs)
        self._sent = []

    def act(self, observation: dict[str, Any]) -> Sequence[Any]:
        """Return the actions that arrive now."""
        self._sent.append(self._actor.act(observation))
        if len(self._sent) > self._latency:
            actions = self._sent.pop(0)
        else:
            actions = self._sent[0] if self._hold is None else [self._hold] * len(self._sent[0])
        if self._ranges is None:
            return actions
        return [self._inexact(action, rng) for action, rng in zip(actions, self._rngs, strict=False)]

    def _inexact(self, action: Any, rng: np.random.Generator) -> Any:
        if action is None:
            return None
        assert self._ranges is not None
        low, high = self._ranges
        noise = self._noise * (high - low) / 2 * rng.standard_normal(low.shape)
        return np.clip(action + noise, low, high).astype(np.float32)


def conditions(result: Mapping[str, Any]) -> str:
    """Return the settings of a `rollout.json` that change the environment, as text; empty: none."""
    settings = result.get("config")
    found = settings if isinstance(settings, dict) else {}
    names = {"distract": "{}", "latency": "latency {} steps", "action_noise": "action noise {}"}
    return ", ".join(text.format(found[name]) for name, text in names.items() if found.get(name))


def _action_ranges(env: Any, name: str) -> np.ndarray:
    """Return the minimum and maximum of each dimension of an action, ``[2, a]``.

    Raises:
        UserError: actions are discrete or have no bounds.
    """
    low, high = (getattr(env.action_space, bound, np.nan) for bound in ("low", "high"))
    ranges = np.stack([low, high])
    if ranges.ndim < 2 or not np.isfinite(ranges).all():
        raise UserError(
            f"{name} must have continuous actions with bounds for action_noise, got {env.action_space}. Use "
            "latency instead, or choose another environment."
        )
    return ranges


def save_rollout(result: Rollout, folder: Path, *, name: str = "rollout.json", **more: Any) -> None:
    """Write `episode_*.mp4` and then `rollout.json`, which exists only if the rollout is complete.

    `per_episode` and `aggregated` have the format of LeRobot's `eval_info.json` (`lerobot-eval`).

    Args:
        result: the rollout.
        folder: output folder; an older rollout in it is replaced.
        name: name of the JSON file; `PARTIAL` if an error ended the rollout early.
        more: further entries of the JSON file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in [folder / "rollout.json", folder / PARTIAL, *folder.glob("episode_*.mp4")]:
        old.unlink(missing_ok=True)
    for i, frames in enumerate(result.videos):
        write_video(folder / f"episode_{i:03d}.mp4", frames, result.fps)
    successes = result.successes
    content = {
        "env": result.env,
        "episodes": len(result.returns),
        "seed": result.seed,
        "success": result.success,
        "return": float(result.returns.mean()),
        "ci95": None if successes is None else success_interval(successes),
        "return_ci95": mean_interval(result.returns, result.seed),
        "successes": None if successes is None else successes.astype(int).tolist(),
        "returns": result.returns.tolist(),
        "lengths": result.lengths.tolist(),
        **_eval_info(result),
        **more,
    }
    write_json(folder / name, content)


def _eval_info(result: Rollout) -> dict[str, Any]:
    """Return the result in the format of LeRobot's `eval_policy`; unreported success counts as failure."""
    e = len(result.returns)
    successes = np.zeros(e, bool) if result.successes is None else result.successes
    return {
        "per_episode": [
            {
                "episode_ix": i,
                "sum_reward": float(result.returns[i]),
                "max_reward": float(result.max_rewards[i]),
                "success": bool(successes[i]),
                "seed": result.seed + i,
            }
            for i in range(e)
        ],
        "aggregated": {
            "avg_sum_reward": float(result.returns.mean()),
            "avg_max_reward": float(result.max_rewards.mean()),
            "pc_success": float(successes.mean() * 100),
            "eval_s": result.seconds,
            "eval_ep_s": result.seconds / e,
        },
    }
