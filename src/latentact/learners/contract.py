"""The contract of learners: a policy learns while it acts in an environment.

A learner is added by one file with a config registered in `LEARNERS`. Its `learn` gets a `LearnerTools`, with
the environment and the stages that train and roll out policies, and returns rows for the report. A stage
whose result exists is not repeated, so an interrupted run resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from latentact.data.store import FrameStore
from latentact.envs.spec import EnvSpec, make_env
from latentact.evaluation.policy.intervals import mean_interval, success_interval
from latentact.policies.contract import PolicyConfig, uses_frames
from latentact.policies.selection import Choose
from latentact.registry import Registry


@dataclass(frozen=True, kw_only=True)
class LearnerTools:
    """The environment to learn in, and the stages that a learner runs."""

    env: EnvSpec
    """The environment."""
    view: str
    """View of the frames; see `make_env`."""
    resolution: int
    """Height and width of the frames in pixels; 0: the environment's own."""
    max_steps: int
    """Steps after which an episode ends; 0: the environment's own limit."""
    policy: PolicyConfig
    """The policy that learns."""
    choose: Choose
    """Selects the class of a discrete action."""
    data: str
    """Path of a dataset of demonstrations; empty: none were given."""
    first_seed: int
    """Reset seed of the first episode to learn from; that of episode i is this plus i."""
    seed: int
    """Random seed of the learner."""
    expert: Callable[[Path], dict[str, Any] | None]
    """`expert(folder)` rolls the environment's expert out on the evaluation seeds and returns `rollout.json`;
    None if the environment has no expert."""
    collect: Callable[[Path, int], Path]
    """`collect(folder, episodes)` writes demonstrations of the expert and returns the folder."""
    train: Callable[..., Path]
    """`train(data, folder, only="", episodes=None)` trains the policy, from scratch or from `start`, on the
    steps of a dataset where the column `only` is true, of some or all episodes, and returns the folder."""
    open: Callable[[Path], FrameStore]
    """`open(data)` returns the frames, states and actions of a dataset."""
    rollout: Callable[[Path, Path], dict[str, Any]]
    """`rollout(policy, folder)` rolls a policy out on the evaluation seeds and returns `rollout.json`."""

    @property
    def uses_frames(self) -> bool:
        """Whether the policy takes frames."""
        return uses_frames(self.policy)

    def make_env(self) -> Any:
        """Return the environment; its frames are black if the policy does not use frames."""
        return make_env(self.env.name, resolution=self.resolution, view=self.view, frames=self.uses_frames)


@runtime_checkable
class LearnerConfig(Protocol):
    """Settings of a learner: a frozen dataclass."""

    @property
    def kind(self) -> str:
        """Registered name."""
        ...

    def check(self, tools: LearnerTools) -> None:
        """Raise a UserError if the learner cannot learn in this environment; nothing is written yet."""
        ...

    def learn(self, tools: LearnerTools, out: Path) -> list[dict[str, Any]]:
        """Learn, and return one row per policy: its `rollout.json`, `method`, and what the learner adds.

        Raises:
            UserError: the learner cannot learn in this environment.
        """
        ...

    def verdict(self, rows: Sequence[dict[str, Any]]) -> str:
        """Return a comparison of the policies and their baselines over the rows of all seeds."""
        ...


LEARNERS: Registry[type[LearnerConfig]] = Registry("learner", "latentact.learners")


@dataclass(frozen=True, kw_only=True)
class Score:
    """Success, or the return where the environment reports none, over the episodes of several rollouts."""

    name: str
    """success or return."""
    mean: float
    """Its mean."""
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end."""

    def above(self, other: Score) -> bool:
        """Return whether this score is higher and the intervals do not overlap."""
        return self.low > other.high

    def __str__(self) -> str:
        """Return the mean and the interval."""
        return f"{self.mean:.3g} ({self.low:.3g} to {self.high:.3g})"


def compare_scores(own: Score, other: Score) -> str:
    """Return "better than" or "worse than"; with overlapping intervals, "no better and no worse than"."""
    if own.above(other):
        return "better than"
    return "worse than" if other.above(own) else "no better and no worse than"


def score(rows: Sequence[dict[str, Any]]) -> Score:
    """Return the score of rollouts together, from their `rollout.json`."""
    if all(row["successes"] is not None for row in rows):
        values = np.concatenate([row["successes"] for row in rows])
        name, (low, high) = "success", success_interval(values)
    else:
        values = np.concatenate([row["returns"] for row in rows])
        name, (low, high) = "return", mean_interval(values)
    return Score(name=name, mean=float(values.mean()), low=low, high=high)
