"""The one environment loop: parallel episodes, with one batched action per step.

It serves demonstrations (an expert acts), random play, rollouts (an agent acts) and imitation (an agent
follows a guide).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np

from latentact.envs.spec import EnvError, Expert, ExpertStuckError, Suite, find_suite, make_expert
from latentact.errors import UserError
from latentact.types import ActionSpace

if TYPE_CHECKING:
    import gymnasium as gym

Recorded = Literal["states", "actions", "nuisances", "infos"]
"""Further data that an episode can record, in addition to frames, rewards and successes."""


class EpisodeEnd(StrEnum):
    """Why an episode ended."""

    TERMINATED = "terminated"
    TRUNCATED = "truncated"
    MAX_STEPS = "max_steps"
    ACTOR = "actor"
    """The actor returned no action."""
    ENV_ERROR = "env_error"
    """The environment failed."""


@runtime_checkable
class Actor(Protocol):
    """The interface of what acts in environments: an agent, an expert, or an agent that follows a guide."""

    def reset(self, num_envs: int) -> None:
        """Clear all per-episode state; the environments of `num_envs` new episodes have just been reset."""
        ...

    def act(self, observation: dict[str, Any]) -> Sequence[Any] | np.ndarray:
        """Return one action per episode; None ends an episode.

        Row j is the same episode from call to call; the action of an episode that has ended is not used.

        Args:
            observation: what `to_observation` returns.
        """
        ...


@runtime_checkable
class FrameSink(Protocol):
    """Receives the frames of an episode, such as a list."""

    def append(self, frame: np.ndarray, /) -> None:
        """Add a frame, uint8 `[h, w, 3]`."""
        ...


@runtime_checkable
class EnvBatch(Protocol):
    """Environments that are reset and stepped together, such as those of a simulator in JAX.

    Results come in the order of the environments. One that fails raises its EnvError when its result is
    taken, and no later result is taken.
    """

    def reset(self, seeds: Sequence[int]) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Yield observation and info of each environment, as `reset` of `make_env` does.

        The observation has `pixels` and, if there is a state, `agent_pos`; the info has `task`.
        """
        ...

    def step(self, actions: Mapping[int, Any]) -> Iterator[tuple[Any, float, bool, bool, dict[str, Any]]]:
        """Yield what `step` of `make_env` returns for each action; the info may have `is_success`.

        Args:
            actions: index of an environment -> its action; the episodes of the others have ended.
        """
        ...


@runtime_checkable
class BatchedSuite(Suite, Protocol):
    """A suite that computes many episodes at once, as many as `EnvSpec.batch`."""

    def batch(self, name: str, seeds: Sequence[int], explore: float) -> tuple[EnvBatch, Actor]:
        """Return environments and the expert that acts in them, as `ExpertActor` acts in single ones.

        Args:
            name: the environment's name.
            seeds: reset seed of each environment and of its expert's own choices.
            explore: probability of an exploratory action at each step.
        """
        ...


def batched_expert(name: str, seeds: Sequence[int], explore: float) -> tuple[EnvBatch, Actor]:
    """Return environments that are computed together, and their expert; see `BatchedSuite.batch`.

    Raises:
        UserError: the suite computes one episode at a time.
    """
    suite, own = find_suite(name)
    if not isinstance(suite, BatchedSuite):
        raise UserError(
            f"the suite of {name} must have `batch` (envs.episode.BatchedSuite), as the spec's batch is more "
            f"than 1, got {type(suite).__name__}."
        )
    return suite.batch(own, seeds, explore)


class SeparateEnvs:
    """Environments of `make_env`, as an `EnvBatch` that steps one after the other."""

    def __init__(self, envs: Sequence[gym.Env]) -> None:
        self._envs = envs

    def reset(self, seeds: Sequence[int]) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Reset each environment when its result is taken."""
        for env, seed in zip(self._envs, seeds, strict=True):
            yield env.reset(seed=seed)

    def step(self, actions: Mapping[int, Any]) -> Iterator[tuple[Any, Any, bool, bool, dict[str, Any]]]:
        """Step each environment when its result is taken."""
        for i, action in actions.items():
            yield self._envs[i].step(action)


@dataclass(kw_only=True)
class Episode:
    """One episode of t steps."""

    seed: int
    """Reset seed."""
    task: str = ""
    """Task text."""
    rewards: list[float] = field(default_factory=list)
    """Reward of each of the t steps."""
    successes: list[bool | None] = field(default_factory=list)
    """`is_success` of each of the t steps; None where the environment reports none."""
    frames: FrameSink | None = None
    """The t + 1 frames, uint8 `[h, w, 3]` each, if they are recorded."""
    states: list[np.ndarray] = field(default_factory=list)
    """The t + 1 robot states, float32 `[s]` each, if they are recorded."""
    actions: list[Any] = field(default_factory=list)
    """The t actions, if they are recorded."""
    nuisances: list[np.ndarray] = field(default_factory=list)
    """State of the distractors at the t + 1 frames, if it is recorded."""
    infos: list[dict[str, Any]] = field(default_factory=list)
    """Gymnasium's `info` of the t steps, if it is recorded."""
    end: EpisodeEnd | None = None
    """Why it ended; None while it runs."""
    error: EnvError | None = None
    """The environment's failure."""

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.rewards)

    @property
    def total_reward(self) -> float:
        """Sum of the rewards."""
        total = 0.0  # not `sum`, which compensates rounding
        for reward in self.rewards:
            total += reward
        return total

    @property
    def success(self) -> bool | None:
        """Whether the task was done at some step; None where the environment never reports it."""
        reported = [success for success in self.successes if success is not None]
        return any(reported) if reported else None


def run_episodes(
    actor: Actor,
    envs: Sequence[gym.Env],
    seeds: Sequence[int],
    *,
    camera: str,
    max_steps: int = 0,
    frames: Sequence[FrameSink | None] = (),
    record: Collection[Recorded] = (),
    on_step: Callable[[], None] = lambda: None,
) -> list[Episode]:
    """Run one episode in each of the environments of `make_env`; see `run_batch`."""
    return run_batch(
        actor,
        SeparateEnvs(envs),
        seeds,
        camera=camera,
        max_steps=max_steps,
        frames=frames,
        record=record,
        on_step=on_step,
    )


def run_batch(
    actor: Actor,
    envs: EnvBatch,
    seeds: Sequence[int],
    *,
    camera: str,
    max_steps: int = 0,
    frames: Sequence[FrameSink | None] = (),
    record: Collection[Recorded] = (),
    on_step: Callable[[], None] = lambda: None,
) -> list[Episode]:
    """Run one episode in each environment, in parallel.

    Where an environment fails, the episodes before it run to their end and those after it are dropped: the
    failed episode is the last one returned, and holds the error.

    Args:
        actor: what acts.
        envs: the environments.
        seeds: reset seed of each.
        camera: key of the frames in the actor's observations.
        max_steps: steps after which an episode ends; 0: no limit but the environment's own.
        frames: sinks for the frames of the first episodes; None: the frames of that episode are not recorded.
        record: further data to record.
        on_step: called after each step of all environments.

    Returns:
        The episodes in the order of the environments.

    Raises:
        UserError: an action is invalid.
    """
    sinks = [*frames, *[None] * (len(seeds) - len(frames))]
    episodes: list[Episode] = []
    observations: list[dict[str, np.ndarray]] = []
    resets = envs.reset([int(seed) for seed in seeds])
    for seed, sink in zip(seeds, sinks, strict=True):
        episode = Episode(seed=int(seed), frames=sink)
        episodes.append(episode)
        try:
            observation, info = next(resets)
        except EnvError as error:
            episode.end, episode.error = EpisodeEnd.ENV_ERROR, error
            break
        episode.task = info["task"]
        observations.append(observation)
        _record(episode, observation, info, record)
    if not observations:
        return episodes
    actor.reset(len(observations))
    tasks = [episode.task for episode in episodes[: len(observations)]]
    while any(episode.end is None for episode in episodes):
        actions = actor.act(to_observation(observations, tasks, camera))
        for i, episode in enumerate(episodes):
            if episode.end is None and actions[i] is None:
                episode.end = EpisodeEnd.ACTOR
        running = {i: actions[i] for i, episode in enumerate(episodes) if episode.end is None}
        steps = envs.step(running)
        for i in running:
            episode = episodes[i]
            try:
                observations[i], reward, terminated, truncated, info = next(steps)
            except EnvError as error:
                episode.end, episode.error = EpisodeEnd.ENV_ERROR, error
                del episodes[i + 1 :]
                break
            episode.rewards.append(float(reward))
            episode.successes.append(info.get("is_success"))
            if "actions" in record:
                episode.actions.append(actions[i])
            if "infos" in record:
                episode.infos.append(info)
            _record(episode, observations[i], info, record)
            if terminated:
                episode.end = EpisodeEnd.TERMINATED
            elif truncated:
                episode.end = EpisodeEnd.TRUNCATED
            elif episode.steps == max_steps:
                episode.end = EpisodeEnd.MAX_STEPS
        on_step()
    return episodes


def _record(
    episode: Episode,
    observation: dict[str, np.ndarray],
    info: dict[str, Any],
    record: Collection[Recorded],
) -> None:
    """Record an observation and the state of its distractors."""
    if episode.frames is not None:
        episode.frames.append(observation["pixels"])
    if "states" in record:
        episode.states.append(observation["agent_pos"])
    if "nuisances" in record:
        episode.nuisances.append(info["nuisance"])


def to_observation(
    observations: Sequence[dict[str, np.ndarray]], tasks: Sequence[str], camera: str
) -> dict[str, Any]:
    """Return observations of `make_env` as one batch with LeRobot's keys.

    Returns:
        `camera` uint8 `[b, h, w, 3]`, `task` a list of b strings and, if the environment has a state,
        `observation.state` float32 `[b, s]`.
    """
    batch: dict[str, Any] = {camera: np.stack([o["pixels"] for o in observations]), "task": list(tasks)}
    if "agent_pos" in observations[0]:
        batch["observation.state"] = np.stack([o["agent_pos"] for o in observations])
    return batch


class ExpertActor:
    """Scripted experts of one environment name, one per episode.

    Args:
        name: the environment's name.
        envs: the environments in which they act.
        seeds: seed of each episode and of its expert's own choices.
        explore: probability of an exploratory action at each step.
    """

    def __init__(
        self, name: str, envs: Sequence[gym.Env], seeds: Sequence[int], explore: float = 0.0
    ) -> None:
        self._name, self._envs, self._seeds, self._explore = name, envs, seeds, explore

    def reset(self, num_envs: int) -> None:
        """Make the experts, for environments that were just reset."""
        pairs = [*zip(self._envs, self._seeds, strict=True)][:num_envs]
        self._experts: list[Expert] = [make_expert(self._name, env, seed) for env, seed in pairs]
        self._rngs = [np.random.default_rng((seed, 1)) for _, seed in pairs]
        self._stuck = [False] * num_envs

    def act(self, observation: dict[str, Any]) -> list[Any]:
        """Return one action per episode; None where the expert is stuck."""
        return [self._action(i) for i in range(len(self._experts))]

    def _action(self, i: int) -> Any:
        if self._stuck[i]:
            return None
        rng = self._rngs[i]
        try:
            return self._experts[i].act(rng if rng.random() < self._explore else None)
        except ExpertStuckError:
            self._stuck[i] = True
            return None


class RandomActor:
    """Random play: uniform draws from the action space, of each episode by its seed.

    Args:
        space: robot action space, whose integers are drawn if it is discrete.
        envs: the environments in which to act, with the bounds of continuous actions.
        seeds: seed of each episode's draws.
        repeat: steps for which each draw is repeated.
    """

    def __init__(
        self, space: ActionSpace, envs: Sequence[gym.Env], seeds: Sequence[int], repeat: int = 1
    ) -> None:
        self._space, self._envs, self._seeds, self._repeat = space, envs, seeds, repeat

    def reset(self, num_envs: int) -> None:
        """Start the draws of new episodes."""
        for env, seed in zip(self._envs, self._seeds, strict=True):
            env.action_space.seed(int(seed))
        self._rngs = [np.random.default_rng((seed, 2)) for seed in self._seeds]
        self._steps = 0

    def act(self, observation: dict[str, Any]) -> list[Any]:
        """Return one action per episode."""
        if self._steps % self._repeat == 0:
            self._actions = [*map(self._draw, self._envs, self._rngs)]
        self._steps += 1
        return self._actions

    def _draw(self, env: gym.Env, rng: np.random.Generator) -> Any:
        if not self._space.discrete:
            return env.action_space.sample()
        return (self._space.values or range(self._space.size))[rng.integers(self._space.size)]
