"""The contract of environments, and functions that create one by name.

A suite is added by one new file in `envs/suites` with a class registered in `ENVS` that has the methods of
`Suite`. The name of an environment is the suite's name, or the suite's name, a slash and a level; every other
name belongs to the suite `gymnasium`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from latentact.errors import UserError, require_one_of
from latentact.registry import Registry
from latentact.types import ActionSpace

if TYPE_CHECKING:
    import gymnasium as gym
    import numpy as np

    from latentact.envs.distract import Distraction


@dataclass(frozen=True, kw_only=True)
class EnvSpec:
    """Observations and actions of an environment."""

    name: str
    """Name as in `make_env`: `babyai/GoToRedBall`, `pusht`, or a Gymnasium id."""
    fps: int
    """Environment steps per second."""
    camera: str
    """Key of its frames in a dataset."""
    action_space: ActionSpace
    """Action space."""
    action_names: tuple[str, ...]
    """Class names of a discrete action, names of the dimensions of a continuous one."""
    state_names: tuple[str, ...]
    """Names of the dimensions of `agent_pos`; empty for an environment without a state."""
    hold: int | None = None
    """Discrete no-op action, for an episode's last row; None: the last action is repeated."""
    time_limit: bool = True
    """Whether the environment truncates every episode after some number of steps."""
    batch: int = 1
    """Episodes of the expert that an `envs.episode.BatchedSuite` computes at once; 1: in other suites."""


class EnvError(UserError):
    """An environment raised an exception, or returned an invalid value."""


_TOOK = "Expert.took is deprecated; use Expert.report_action."


class ExpertStuckError(Exception):
    """The expert has no action; the episode has failed."""


@runtime_checkable
class Expert(Protocol):
    """A scripted policy for one episode that may read the environment's internals; subclass it.

    `act` is called at every step, also after an action of another agent, which `report_action` gives.
    """

    def act(self, explore: np.random.Generator | None = None) -> int | np.ndarray:
        """Return the action for the environment's current state: an integer of its space, or float32 `[a]`.

        With `explore` it is a random action (BabyAI) or the expert's with noise from that generator.

        Raises:
            ExpertStuckError: it has no action.
        """
        ...

    def report_action(self, action: int | np.ndarray) -> None:
        """Receive the action executed since `act`, if it differs; by default this changes nothing."""
        if type(self).took is not Expert.took:
            warnings.warn(_TOOK, DeprecationWarning, stacklevel=2)
            self.took(action)

    def took(self, action: int | np.ndarray) -> None:
        """Former name of `report_action`."""
        if type(self).report_action is not Expert.report_action:
            warnings.warn(_TOOK, DeprecationWarning, stacklevel=2)
            self.report_action(action)


@runtime_checkable
class Suite(Protocol):
    """A family of environments."""

    def check(self, name: str) -> None:
        """Raise a UserError if the suite has no environment of that name."""
        ...

    def make(self, name: str, resolution: int, view: str) -> gym.Env:
        """Return the environment, adapted to the observation of `make_env`."""
        ...

    def spec(self, name: str, view: str) -> EnvSpec:
        """Return the environment's specification."""
        ...

    def expert(self, name: str, env: gym.Env, seed: int) -> Expert:
        """Return an expert for the episode to which `env` was just reset."""
        ...


ENVS: Registry[type[Suite]] = Registry("environment suite", "latentact.envs.suites", "latentact.envs")

EXPERTS: Registry[Callable[[Any, int], Expert]] = Registry("expert", "latentact.envs.experts")
"""Experts of Gymnasium ids, `Pendulum-v1`: called with the environment that was just reset, and a seed."""

VIEWS = ("agent", "full")
ALIASES = {
    "PushT-v0": "pusht",
    "gym_pusht/PushT-v0": "pusht",
    "gym_pusht:gym_pusht/PushT-v0": "pusht",
}
"""Gymnasium ids of environments that have a suite here."""


def make_env(
    name: str,
    *,
    resolution: int = 0,
    view: str = "agent",
    distract: Distraction | None = None,
    frames: bool = True,
) -> gym.Env:
    """Create the environment `name`.

    Observations are dicts of `pixels` uint8 `[h, w, 3]` and, where the environment has a state, `agent_pos`
    float32 `[s]`. `info` holds `task` (text, may be empty) after `reset`, and `is_success` after every `step`
    of an environment that reports success. With distractors it holds `nuisance`: float32 `[4]`.

    `step` takes one of the integers of a discrete action space (`ActionSpace.values`), or finite floats
    `[a]`, which are clipped to the bounds.

    Args:
        name: `babyai/<Level>`, `metaworld/<task>`, `pusht` (also as `gym_pusht/PushT-v0`), or any Gymnasium
            id, also `PACKAGE:ID` and `PACKAGE/NAME`, whose package is imported.
        resolution: height and width of the frames in pixels; 0: the environment's own.
        view: "agent" (the agent's own view) or "full" (the whole world), for environments that have both.
        distract: distractors in the frames; a background is available in babyai, pusht and metaworld.
        frames: False: frames are black and cost no time, for policies that use the state alone.

    Raises:
        UserError: the name or view is unknown, there are no distractors, or a package is missing; an action
            is of another kind or size, or not finite.
        EnvError: the environment itself fails, here or in `reset` and `step`.
    """
    if resolution < 0:
        raise UserError(
            f"resolution must be at least 0, got {resolution}. Give the size in pixels, or 0 for the "
            "environment's own."
        )
    suite, name = find_suite(name, view)
    env: Any = suite.make(name, resolution, view)
    if distract:
        env.distract(distract)
    if not frames:
        env.draw(False)
    return env


def env_spec(name: str, *, view: str = "agent") -> EnvSpec:
    """Return the specification of the environment `name`.

    Raises:
        UserError: as in `make_env`.
    """
    suite, name = find_suite(name, view)
    return suite.spec(name, view)


def make_expert(name: str, env: gym.Env, seed: int) -> Expert:
    """Return an expert for the episode to which `env` was just reset; the same seed gives the same actions.

    Args:
        name: the environment's name.
        env: what `make_env` returned for it, after `reset`.
        seed: seed of the expert's own choices.

    Raises:
        UserError: the environment has no expert.
    """
    suite, name = find_suite(name)
    return suite.expert(name, env, seed)


def find_suite(name: str, view: str = "agent") -> tuple[Suite, str]:
    """Return the suite of an environment and its name in the suite.

    Raises:
        UserError: the name or view is unknown.
    """
    require_one_of("view", view, VIEWS)
    name = ALIASES.get(name, name)
    prefix = name.partition("/")[0]
    suite = ENVS.get(prefix if prefix in ENVS.names() else "gymnasium")()
    suite.check(name)
    return suite, name
