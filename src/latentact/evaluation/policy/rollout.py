"""A policy in an environment: many episodes side by side in one process, with the environment's own success.

Episode i starts from reset seed `seed + i`, so two policies face the same episodes. Intervals are 95 %:
Wilson's for the success rate, a percentile bootstrap for a mean.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Shaped, UInt8

from latentact.envs.checks import check_ranges, check_step_limit
from latentact.envs.distract import Distraction
from latentact.envs.spec import EnvError, env_spec, make_env
from latentact.errors import UserError
from latentact.io.atomic import write_json
from latentact.io.video_writer import write_video

if TYPE_CHECKING:
    from collections.abc import Sequence
log = logging.getLogger(__name__)

RESAMPLES = 10_000
PARTIAL = "partial.json"
"""The episodes before an error, in the form of `rollout.json`."""


@runtime_checkable
class Actor(Protocol):
    """A policy as environments see it: a batch of observations in, a batch of actions out."""

    def reset(self, num_envs: int) -> None:
        """Forget everything: `num_envs` new episodes begin."""
        ...

    def act(
        self,
        pixels: UInt8[np.ndarray, "b h w c"],
        state: Float32[np.ndarray, "b s"] | None,
        tasks: list[str],
    ) -> Shaped[np.ndarray, " b *a"]:
        """Return the environment's integers, int64 `[b]`, or float32 actions `[b, a]`.

        Row j is the same episode from call to call; the action of an episode that has ended is not used.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """What happened in e episodes."""

    env: str
    """Name of the environment."""
    seed: int
    """Reset seed of the first episode."""
    fps: int
    """Steps per second."""
    successes: np.ndarray | None
    """bool `[e]`: the task was done at some step; None where the environment reports it in no episode."""
    returns: np.ndarray
    """float64 `[e]`: sum of rewards."""
    lengths: np.ndarray
    """int64 `[e]`: steps taken."""
    videos: list[np.ndarray]
    """uint8 `[t, h, w, 3]` of the first episodes, what the policy saw."""

    @property
    def success(self) -> float | None:
        """Share of successful episodes."""
        return None if self.successes is None else float(self.successes.mean())


class RolloutStoppedError(EnvError):
    """The environment failed in an episode; `finished` holds those before it, None where there are none."""

    def __init__(self, message: str, finished: Rollout | None) -> None:
        super().__init__(message)
        self.finished = finished


def rollout(
    actor: Actor,
    env_name: str,
    *,
    episodes: int,
    seed: int,
    resolution: int = 0,
    view: str = "agent",
    distract: Distraction | None = None,
    max_steps: int = 0,
    record: int = 0,
    num_envs: int = 64,
) -> Rollout:
    """Let `actor` act in `episodes` episodes and return what happened.

    Args:
        actor: the policy.
        env_name: as for `make_env`.
        episodes: number of episodes.
        seed: episode i uses reset seed `seed + i`.
        resolution: height and width of the frames in pixels; 0: the environment's own.
        view: as for `make_env`.
        distract: as for `make_env`.
        max_steps: steps after which an episode ends; 0: the environment's own limit.
        record: number of episodes, from the first, whose frames are kept.
        num_envs: episodes played side by side; changes the speed only.

    Raises:
        UserError: unknown environment, a number out of range, or nothing that ends an episode.
        RolloutStoppedError: the environment failed; the episodes before are in it.
    """
    check_ranges(episodes=episodes, seed=seed, max_steps=max_steps, record=record)
    if num_envs < 1:
        raise UserError(f"num_envs must be at least 1, got {num_envs}. Give such a number.")
    spec = env_spec(env_name, view=view)
    check_step_limit(spec, max_steps)
    groups = np.array_split(np.arange(episodes), -(-episodes // num_envs))
    envs = [make_env(env_name, resolution=resolution, view=view, distract=distract) for _ in groups[0]]
    played: list[_Episode] = []
    error = None
    for group in groups:
        finished, error = _play(actor, envs[: len(group)], seed + group, max_steps, record - len(played))
        played += finished
        log.info("%s: %d/%d episodes", env_name, len(played), episodes)
        if error:
            break
    for env in envs:
        env.close()
    result = _result(env_name, seed, spec.fps, played, record) if played else None
    if error:
        raise RolloutStoppedError(str(error), result) from error
    assert result is not None
    return result


def _result(env_name: str, seed: int, fps: int, played: list[_Episode], record: int) -> Rollout:
    reported = any(episode.success is not None for episode in played)
    return Rollout(
        env=env_name,
        seed=seed,
        fps=fps,
        successes=np.array([bool(episode.success) for episode in played]) if reported else None,
        returns=np.array([episode.reward for episode in played]),
        lengths=np.array([episode.length for episode in played]),
        videos=[np.stack(episode.frames) for episode in played[:record]],
    )


@dataclass(kw_only=True)
class _Episode:
    """One running episode."""

    observation: dict[str, np.ndarray]
    task: str
    frames: list[np.ndarray]
    reward: float = 0.0
    length: int = 0
    success: bool | None = None
    ended: bool = False


def _play(
    actor: Actor, envs: list[Any], seeds: np.ndarray, max_steps: int, record: int
) -> tuple[list[_Episode], EnvError | None]:
    """Play one episode in each environment, side by side; keep the frames of the first `record`.

    Where an environment fails, the episodes before it are played to their end and returned with its error.
    """
    running: list[_Episode] = []
    error: EnvError | None = None
    for env, seed in zip(envs, seeds, strict=True):
        try:
            observation, info = env.reset(seed=int(seed))
        except EnvError as failed:
            error = failed
            break
        running.append(_Episode(observation=observation, task=info["task"], frames=[observation["pixels"]]))
    actor.reset(len(running))
    kept = len(running)
    while not all(episode.ended for episode in running[:kept]):
        observations = [episode.observation for episode in running]
        state = np.stack([o["agent_pos"] for o in observations]) if "agent_pos" in observations[0] else None
        actions = actor.act(np.stack([o["pixels"] for o in observations]), state, [e.task for e in running])
        for i, episode in enumerate(running[:kept]):
            if episode.ended:
                continue
            try:
                episode.observation, reward, terminated, truncated, info = envs[i].step(actions[i])
            except EnvError as failed:
                kept, error = i, failed
                break
            episode.reward += reward
            episode.length += 1
            if "is_success" in info:
                episode.success = episode.success or info["is_success"]
            if i < record:
                episode.frames.append(episode.observation["pixels"])
            episode.ended = terminated or truncated or episode.length == max_steps
    return running[:kept], error


def success_interval(successes: Sequence[bool] | np.ndarray) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a success rate (Wilson, 1927)."""
    n, rate, z = len(successes), float(np.mean(successes)), 1.959963984540054
    center = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # At the ends the formula gives 0 and 1, but for rounding.
    return (max(0.0, center - half) if rate > 0 else 0.0), (min(1.0, center + half) if rate < 1 else 1.0)


def mean_interval(values: Sequence[float] | np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of a mean; the same seed gives the same interval."""
    array = np.asarray(values, np.float64)
    draws = np.random.default_rng(seed).integers(len(array), size=(RESAMPLES, len(array)))
    low, high = np.quantile(array[draws].mean(1), [0.025, 0.975])
    return float(low), float(high)


def save_rollout(result: Rollout, folder: Path, *, name: str = "rollout.json", **more: Any) -> None:
    """Write `episode_*.mp4` and then `rollout.json`, whose presence says that the rollout is whole.

    Args:
        result: the rollout.
        folder: where; an older rollout there is replaced.
        name: of the json file; `PARTIAL` where an error ended the rollout early.
        more: further entries of the json file.
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
        **more,
    }
    write_json(folder / name, content)
