"""DAgger (Ross et al., arXiv 1011.0686), compared with behavior cloning on as many labels of the same expert.

The learner acts, the expert labels the visited states with its actions, and the learner is trained from
scratch on all labels so far. A frame is labeled only once: a learner that is stuck would otherwise spend its
labels on one frame. The baseline learns from the expert's own episodes. Rounds are counted in labels, not in
episodes.

Each round is a folder of episodes with a manifest that is written last and holds their hashes; a round
without a manifest is played again, with the same result.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from latentact.agents.agent import STATE, TASK, Agent
from latentact.agents.load import load_agent
from latentact.config import Between, check_bounds
from latentact.data.lerobot.writer import (
    EpisodeBuffer,
    RecordSpec,
    require_lerobot,
    stage_episode,
    write_dataset,
)
from latentact.envs.episode import run_episodes
from latentact.envs.spec import EnvSpec, ExpertStuckError, make_expert
from latentact.errors import UserError
from latentact.io.arrays import load_npy
from latentact.io.atomic import atomic_write, read_json, write_json
from latentact.io.records import Record, read_record
from latentact.learners.contract import LEARNERS, LearnerTools, compare_scores, score
from latentact.progress import Progress

log = logging.getLogger(__name__)

MANIFEST, LABELED, SIDECAR = "round.json", "labeled.npy", "dagger.json"
PATIENCE = 100
"""Episodes without a frame to label after which the round is given up."""


@LEARNERS.register("dagger")
@dataclass(frozen=True, kw_only=True)
class DaggerConfig:
    """Settings of DAgger."""

    kind: str = "dagger"
    """Registered name."""
    labels: tuple[int, ...] = (200, 400, 800, 1600)
    """Labels after each round, ascending; the policy is trained and evaluated at each of them."""
    beta: Annotated[float, Between(0, 1)] = 0.0
    """Round r executes the expert's action with probability beta^r: always in round 0; with 0 never again."""
    cap: Annotated[float, Between(0, 1000)] = 1.75
    """Longest episode of the learner, in mean lengths of the expert's; 0: the environment's limit."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        check_bounds(self, "learner.")
        ascending = all(a < b for a, b in itertools.pairwise((0, *self.labels)))
        if not self.labels or not ascending or self.labels[-1] > 10**7:
            raise UserError(f"learner.labels must be ascending numbers from 1 to 10^7, got {[*self.labels]}.")

    def check(self, tools: LearnerTools) -> None:
        """Raise a UserError if LeRobot is missing or the environment has no expert."""
        require_lerobot()
        env = tools.make_env()
        env.reset(seed=tools.first_seed)
        make_expert(tools.env.name, env, tools.first_seed)
        env.close()

    def learn(self, tools: LearnerTools, out: Path) -> list[dict[str, Any]]:
        """Run both arms and return a row per arm and number of labels."""
        expert = tools.expert(out / "expert")
        assert expert is not None  # see `check`
        limit = math.ceil(self.cap * float(np.mean(expert["lengths"])))
        rows = [expert | {"method": "expert", "labels": None, "run": "expert"}]
        for method in ("dagger", "bc"):
            arm = _Arm(config=self, tools=tools, out=out, method=method, limit=limit)
            rows += [arm.row(number) for number in range(len(self.labels))]
            arm.close()
        return rows

    def verdict(self, rows: Sequence[dict[str, Any]]) -> str:
        """Return how DAgger compares with behavior cloning at the most labels, and at the other counts."""

        def at(method: str, labels: int) -> Any:
            return score([row for row in rows if (row["method"], row["labels"]) == (method, labels)])

        pairs = {n: (at("dagger", n), at("bc", n)) for n in self.labels}
        learner, cloning = pairs[self.labels[-1]]
        first = (
            f"DAgger is {compare_scores(learner, cloning)} behavior cloning: {learner.name} {learner} "
            f"against {cloning}, with {self.labels[-1]} labels of the expert each."
        )
        later = [pair for n, pair in pairs.items() if n != self.labels[0]]
        ahead, behind = (sum(a.above(b) for a, b in each) for each in (later, [pair[::-1] for pair in later]))
        return (
            f"{first} At the first label count both are identical. Of the later counts ({len(later)}), "
            f"DAgger is better at {ahead} and worse at {behind}, with intervals that do not overlap."
        )


class _File(Record):
    file: str = Field(pattern=r"^(\d{7}\.(npz|mp4)|labeled\.npy)$")
    sha256: str


class _Round(Record):
    """The manifest of a round."""

    labels: int
    """Labels of this round and those before."""
    first: int
    """Number of its first episode."""
    episodes: int
    """Episodes played."""
    beta: float
    """Probability of the expert's action."""
    files: list[_File]
    """Everything else in its folder."""


@dataclass(kw_only=True)
class _Arm:
    """Rounds of one method; the first, in which the expert acts, is shared and stored in DAgger's folder."""

    config: DaggerConfig
    tools: LearnerTools
    out: Path
    method: str
    limit: int

    def row(self, number: int) -> dict[str, Any]:
        """Play, train and evaluate a round; return its row."""
        place, labels = self._place(number), self.config.labels[number]
        folder = place / f"labels{labels}"
        manifest = self._round(number)
        rounds = [self._round_folder(r) for r in range(number + 1)]
        episodes = sum(read_record(_Round, each / MANIFEST).episodes for each in rounds)
        if not (folder / "rollout" / "rollout.json").exists():
            data = place / "data"
            self._write_data(data, rounds, labels)
            self.tools.train(data, folder / "policy", "labeled")
        result = self.tools.rollout(folder / "policy", folder / "rollout")
        return result | {
            "method": self.method,
            "labels": labels,
            "beta": 1.0 if self.method == "bc" else manifest.beta,
            "played": episodes,
            "run": (folder / "rollout").relative_to(self.out).as_posix(),
        }

    def close(self) -> None:
        """Close the environment."""
        self._env.close()

    def _place(self, number: int) -> Path:
        return self.out / (self.method if number else "dagger")

    def _round_folder(self, number: int) -> Path:
        return self._place(number) / f"round{number}"

    def _round(self, number: int) -> _Round:
        """Return the manifest of a round, which is played if it does not exist.

        Raises:
            UserError: the folder holds what the round did not leave there.
        """
        folder = self._round_folder(number)
        if folder.exists():
            return _verified(folder)
        before = read_record(_Round, self._round_folder(number - 1) / MANIFEST) if number else None
        known: set[int] = set()
        for earlier in map(self._round_folder, range(number)):
            known |= set(load_npy(earlier / LABELED, "delete the folder and re-run the command").tolist())
        draft = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        agent, beta = None, 1.0
        if number and self.method == "dagger":
            last = self._place(number - 1) / f"labels{self.config.labels[number - 1]}" / "policy"
            agent, beta = load_agent(last, choose=self.tools.choose), self.config.beta**number
        first = before.first + before.episodes if before else 0
        target = self.config.labels[number] - (before.labels if before else 0)
        episodes, new = self._play(draft, agent, beta, known, first, target)
        with atomic_write(draft / LABELED) as partial, partial.open("wb") as file:
            np.save(file, np.array(new, np.uint64))
        write_json(
            draft / MANIFEST,
            {
                "labels": self.config.labels[number],
                "first": first,
                "episodes": episodes,
                "beta": beta,
                "files": [{"file": path.name, "sha256": _sha256(path)} for path in sorted(draft.iterdir())],
            },
        )
        draft.rename(folder)
        return _verified(folder)

    def _play(
        self, folder: Path, agent: Agent | None, beta: float, known: set[int], first: int, target: int
    ) -> tuple[int, list[int]]:
        """Stage episodes until there are `target` labels; return their number and the keys of labels.

        Args:
            folder: output folder.
            agent: the learner; None: the expert acts.
            beta: probability that the expert's action is executed in place of the learner's.
            known: keys of frames that have a label; the new ones are added.
            first: number of the first episode.
            target: labels to reach.
        """
        new, without, number = [], 0, first
        with Progress(f"{self.method}, labels", target, "labels") as progress:
            for number in itertools.count(first):
                episode, keys = self._episode(self._env, number, agent, beta, known, target - len(new))
                if episode is not None:
                    stage_episode(folder / f"{number:07d}.npz", self._record_spec(), episode)
                new += keys
                progress.advance(len(keys))
                without = 0 if keys else without + 1
                if len(new) == target:
                    break
                if without == PATIENCE:
                    raise UserError(
                        f"learner.labels must be reachable, got {len(new)} of {target} new labels before "
                        f"{PATIENCE} episodes in a row had no unlabeled frame. Give fewer labels."
                    )
        return number - first + 1, new

    def _episode(
        self, env: Any, number: int, agent: Agent | None, beta: float, known: set[int], target: int
    ) -> tuple[EpisodeBuffer | None, list[int]]:
        """Play one episode; return it and the keys of its labels; None if the expert has no first action.

        Args:
            env: the environment.
            number: number of the episode, which gives its seed.
            agent: as in `_play`.
            beta: as in `_play`.
            known: as in `_play`.
            target: labels after which the episode ends.
        """
        spec, seed = self.tools.env, self.tools.first_seed + number
        actor = _LabelingActor(
            env, spec, seed, agent=agent, beta=beta, key=self._key, known=known, target=target
        )
        limits = (self.tools.max_steps, 0 if agent is None else self.limit)
        limit = min(filter(None, limits), default=0)
        frames: list[np.ndarray] = []
        (played,) = run_episodes(
            actor,
            [env],
            [seed],
            camera=spec.camera,
            max_steps=limit,
            frames=[frames],
            record=("actions", "states") if spec.state_names else ("actions",),
        )
        if played.error is not None:
            raise played.error
        if not played.steps:
            return None, actor.keys
        dtype = np.int64 if spec.action_space.discrete else np.float32
        labels, executed, hold = actor.labels, played.actions, spec.hold
        success = [bool(each) for each in played.successes]
        return EpisodeBuffer(
            frames=np.stack(frames),
            state=np.stack(played.states) if spec.state_names else None,
            action=np.array([*labels, labels[-1] if hold is None else hold], dtype),
            executed_action=np.array([*executed, executed[-1] if hold is None else hold], dtype),
            intervention=np.array([*actor.interventions, False]),
            labeled=np.array([*actor.labeled, False]),
            reward=np.array([*played.rewards, 0.0], np.float32),
            success=np.array([*success, success[-1]]),
            task=played.task,
        ), actor.keys

    def _key(self, observation: dict[str, Any]) -> int:
        """Return a 64-bit hash of the policy's inputs in an observation of one episode."""
        parts = [observation[TASK][0].encode()]
        if self.tools.uses_frames:
            parts.append(observation[self.tools.env.camera][0].tobytes())
        if self.tools.policy.network.use_state:
            parts.append(observation[STATE][0].tobytes())
        return int.from_bytes(hashlib.blake2b(b"\0".join(parts), digest_size=8).digest())

    @functools.cached_property
    def _env(self) -> Any:
        return self.tools.make_env()

    def _record_spec(self) -> RecordSpec:
        height, width, _ = self._env.observation_space["pixels"].shape
        return RecordSpec.of_env(self.tools.env, height, width, takeover=True)

    def _write_data(self, data: Path, rounds: list[Path], labels: int) -> None:
        """Write the episodes of some rounds as one dataset, unless it holds them already."""
        content = {"env": self.tools.env.name, "rounds": len(rounds), "labels": labels}
        if (data / "meta" / SIDECAR).is_file() and read_json(data / "meta" / SIDECAR) == content:
            return
        staged = sorted(path for folder in rounds for path in folder.glob("*.npz"))
        shutil.rmtree(data, ignore_errors=True)
        write_dataset(data, self._record_spec(), staged, sidecars={SIDECAR: content})


class _LabelingActor:
    """The actor of one episode: the learner or the expert acts, and the expert labels every state.

    Args:
        env: the environment.
        spec: its specification.
        seed: seed of the episode.
        agent: the learner; None: the expert acts.
        beta: probability that the expert's action is executed in place of the learner's.
        key: observation -> hash of the policy's inputs.
        known: keys of frames that have a label; the new ones are added.
        target: labels after which the episode ends.

    Attributes:
        labels: the expert's action at each step.
        interventions: whether the expert's action was executed, at each step.
        labeled: whether the step counts as a label, at each step.
        keys: keys of the steps that count.
    """

    def __init__(
        self,
        env: Any,
        spec: EnvSpec,
        seed: int,
        *,
        agent: Agent | None,
        beta: float,
        key: Callable[[dict[str, Any]], int],
        known: set[int],
        target: int,
    ) -> None:
        self._env, self._spec, self._seed = env, spec, seed
        self._agent, self._beta = agent, beta
        self._key, self._known, self._target = key, known, target
        self.labels: list[Any] = []
        self.interventions: list[bool] = []
        self.labeled: list[bool] = []
        self.keys: list[int] = []

    def reset(self, num_envs: int) -> None:
        """Make the expert, for the environment that was just reset."""
        self._random = np.random.default_rng((self._seed, 2))
        self._expert = make_expert(self._spec.name, self._env, self._seed)
        self._taken: Any = None
        if self._agent is not None:
            self._agent.reset(num_envs)
            torch.manual_seed(self._seed)

    def act(self, observation: dict[str, Any]) -> list[Any]:
        """Return the action; None after `target` labels, or if the expert is stuck."""
        if self._taken is not None:
            self._expert.report_action(self._taken)
        if len(self.keys) == self._target:
            return [None]
        try:
            label = self._expert.act()
        except ExpertStuckError:
            return [None]
        key, action, intervenes = self._key(observation), label, True
        if self._agent is not None:
            own = self._agent.act(observation)[0]
            intervenes = self._random.random() < self._beta
            action = label if intervenes else self._within_bounds(own)
        self._taken = None if intervenes else action
        asked = key not in self._known and (not self._spec.action_space.discrete or label != self._spec.hold)
        if asked:
            self._known.add(key)
            self.keys.append(key)
        self.labels.append(label)
        self.interventions.append(intervenes)
        self.labeled.append(asked)
        return [action]

    def _within_bounds(self, action: Any) -> Any:
        """Return an action within the bounds of the environment."""
        if self._spec.action_space.discrete:
            return int(action)
        space: Any = self._env.action_space
        return np.clip(action, space.low, space.high).astype(np.float32)


def _verified(folder: Path) -> _Round:
    """Return the manifest of a finished round.

    Raises:
        UserError: a file is not the one that the round wrote, or does not belong to it.
    """
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"{folder} must hold the manifest {MANIFEST}, got none. Delete the folder and re-run."
        )
    manifest = read_record(_Round, folder / MANIFEST)
    known = {each.file: each.sha256 for each in manifest.files}
    for path in sorted(folder.iterdir()):
        regular = path.is_file() and not path.is_symlink()
        if path.name != MANIFEST and not (regular and _sha256(path) == known.pop(path.name, "")):
            raise UserError(
                f"{path} must be unchanged since its round finished, got a different file, which was not "
                f"opened. Delete {folder.name} and later rounds, and re-run the command."
            )
    if known:
        raise UserError(f"{folder} must hold {min(known)}, got no such file. Delete the folder and re-run.")
    return manifest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
