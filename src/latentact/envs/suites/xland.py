"""XLand-MiniGrid: rulesets in a grid world, in JAX (Nikulin et al., 2024; package xminigrid).

A level is a layout and the seed of a ruleset, `xland/R1-9x9/7`: every episode has the same goal and objects,
and other places. Frames are no images but the agent's own view of 5x5 cells: channel 0 is the tile (0..12),
channel 1 its color (0..11), channel 2 is zero. This is the observation of XLand-MiniGrid in the form of an
image, which datasets store as PNG, without loss.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from latentact.envs.adapt import adapt
from latentact.envs.boundary import import_gymnasium
from latentact.envs.episode import Actor, EnvBatch
from latentact.envs.spec import ENVS, EnvSpec, Expert, ExpertStuckError
from latentact.errors import UserError, did_you_mean, missing_extra
from latentact.types import ActionSpace

if TYPE_CHECKING:
    import gymnasium as gym

    from latentact.envs.xland_planner import Task

ACTIONS = ("forward", "right", "left", "pick_up", "put_down", "toggle")
STATE = ("row", "column", "facing_up", "facing_right", "facing_down", "facing_left", "carrying")
PREFIX = "XLand-MiniGrid-"
FEW, BATCH = 64, 1024
"""Numbers of episodes that are computed at once: two sizes to compile for."""


@ENVS.register("xland")
class XLand:
    """Levels `LAYOUT/SEED` of the layouts of XLand-MiniGrid."""

    def check(self, name: str) -> None:
        """Raise a UserError if there is no such level."""
        _, _, level = name.partition("/")
        layout, _, seed = level.partition("/")
        if layout not in (known := _layouts()):
            raise UserError(
                f"unknown XLand layout {layout!r}{did_you_mean(layout, known)} A level is a layout and the "
                "seed of a ruleset, such as xland/R1-9x9/0."
            )
        if not re.fullmatch(r"0|[1-9]\d{0,8}", seed):
            raise UserError(
                f"the ruleset of {name} must be a seed from 0 to 999999999, got {seed!r}. Give a level such "
                f"as xland/{layout}/0."
            )

    def spec(self, name: str, view: str) -> EnvSpec:
        """Return the specification of a level; all have the same actions and state."""
        return EnvSpec(
            name=name,
            fps=10,
            camera="observation.images.agent",
            action_space=ActionSpace(kind="discrete", size=len(ACTIONS)),
            action_names=ACTIONS,
            state_names=STATE,
            batch=BATCH,
        )

    def make(self, name: str, resolution: int, view: str) -> gym.Env:
        """Return the level."""
        if resolution not in (0, 5) or view != "agent":
            raise UserError(
                f"the frames of {name} must be the agent's view of 5x5 cells, got resolution {resolution} "
                f"and view {view!r}. Leave both at their defaults."
            )
        layout, task = _level(name)
        return adapt(
            _env_class()(layout, task),  # type: ignore[call-arg]
            name=name,
            pixels=lambda observation: observation["pixels"],
            resolution=0,
            state=lambda observation: observation["state"],
            state_range=(np.zeros(len(STATE)), np.array([layout.size, layout.size, 1, 1, 1, 1, 1])),
            task=lambda: task.text,
            success=lambda reward, terminated, _: terminated,
        )

    def expert(self, name: str, env: gym.Env, seed: int) -> Expert:
        """Return the planner of `envs.xland_planner`, which makes no random choices."""
        return _Planner(env.unwrapped, _level(name)[0])

    def batch(self, name: str, seeds: Sequence[int], explore: float) -> tuple[EnvBatch, Actor]:
        """Return environments that are computed together, and the planner that acts in them."""
        envs = _Envs(*_level(name))
        return envs, _Planners(envs, seeds, explore)


class _Envs:
    """Environments of one level, computed in one call; `timestep` is their true state."""

    def __init__(self, layout: _Layout, task: Task) -> None:
        self.layout, self._task, self.timestep = layout, task, None
        self._size = 0

    def reset(self, seeds: Sequence[int]) -> Iterator[tuple[dict[str, np.ndarray], dict[str, Any]]]:
        """Reset all environments; computed ones that are not needed have the last seed."""
        count = len(seeds)
        self._size = FEW if count <= FEW else max(count, BATCH)
        filled = np.array([*seeds, *[seeds[-1]] * (self._size - count)])
        self.timestep, out = self.layout.reset_all(self._task.ruleset, filled)
        rows: dict[str, np.ndarray] = {key: np.array(value) for key, value in out.items()}
        for i in range(count):
            yield _observation(rows, i), {"task": self._task.text}

    def step(
        self, actions: Mapping[int, int]
    ) -> Iterator[tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]]:
        """Step all environments; those without an action go forward."""
        chosen = np.zeros(self._size, np.int64)
        chosen[[*actions]] = [*actions.values()]
        self.timestep, out = self.layout.step_all(self._task.ruleset, self.timestep, chosen)
        rows: dict[str, np.ndarray] = {key: np.array(value) for key, value in out.items()}
        for i in actions:
            terminated = bool(rows["terminated"][i])
            truncated, info = bool(rows["truncated"][i]), {"is_success": terminated}
            yield _observation(rows, i), float(rows["reward"][i]), terminated, truncated, info


def _observation(rows: dict[str, np.ndarray], i: int) -> dict[str, np.ndarray]:
    return {"pixels": rows["pixels"][i], "agent_pos": rows["state"][i]}


class _Planners:
    """The planner in many environments."""

    def __init__(self, envs: _Envs, seeds: Sequence[int], explore: float) -> None:
        self._envs, self._seeds, self._explore = envs, seeds, explore

    def reset(self, num_envs: int) -> None:
        """Start the random choices of every episode."""
        self._rngs = [np.random.default_rng((seed, 1)) for seed in self._seeds]

    def act(self, observation: dict[str, Any]) -> list[int | None]:
        """Return one action per episode; None where there is no path to the goal."""
        assert self._envs.timestep is not None
        planned, possible = map(np.array, self._envs.layout.plan_all(self._envs.timestep.state))
        actions: list[int | None] = []
        for i, rng in enumerate(self._rngs):
            action = rng.integers(len(ACTIONS)) if rng.random() < self._explore else planned[i]
            actions.append(int(action) if possible[i] else None)
        return actions


class _Planner(Expert):
    """The planner in one environment."""

    def __init__(self, env: Any, layout: _Layout) -> None:
        self._env, self._layout = env, layout

    def act(self, explore: np.random.Generator | None = None) -> int:
        action, possible = self._layout.plan(self._env.timestep.state)
        if not possible:
            raise ExpertStuckError("there is no path to the goal")
        return int(action) if explore is None else int(explore.integers(len(ACTIONS)))


class _Layout:
    """A layout of XLand-MiniGrid and its compiled functions, which serve every ruleset."""

    def __init__(self, name: str) -> None:
        from xminigrid.registration import make

        from latentact.envs.xland_planner import jax, jnp, plan

        env, params = make(PREFIX + name)
        self.size: int = params.height

        def reset(ruleset: Any, seed: Any) -> tuple[Any, dict[str, Any]]:
            return observe(env.reset(params.replace(ruleset=ruleset), jax.random.key(seed)))

        def step(ruleset: Any, timestep: Any, action: Any) -> tuple[Any, dict[str, Any]]:
            return observe(env.step(params.replace(ruleset=ruleset), timestep, action))

        def observe(timestep: Any) -> tuple[Any, dict[str, Any]]:
            agent = timestep.state.agent
            state = [agent.position, jnp.arange(4) == agent.direction, agent.pocket[:1] != 0]
            return timestep, {
                "pixels": jnp.pad(timestep.observation.astype(jnp.uint8), ((0, 0), (0, 0), (0, 1))),
                "state": jnp.concatenate(state, dtype=jnp.float32),
                "reward": timestep.reward,
                "terminated": timestep.discount == 0,
                "truncated": timestep.last() & (timestep.discount != 0),
            }

        self.plan, self.plan_all = jax.jit(plan), jax.jit(jax.vmap(plan))
        self.reset, self.step = jax.jit(reset), jax.jit(step)
        self.reset_all = jax.jit(jax.vmap(reset, (None, 0)))
        self.step_all = jax.jit(jax.vmap(step, (None, 0, 0)))


@functools.cache
def _layout(name: str) -> _Layout:
    return _Layout(name)


@functools.cache
def _task(seed: int) -> Task:
    from latentact.envs.xland_planner import make_task

    return make_task(seed)


def _level(name: str) -> tuple[_Layout, Task]:
    """Return the layout and the ruleset of a level."""
    _, layout, seed = name.split("/")
    return _layout(layout), _task(int(seed))


def _layouts() -> list[str]:
    """Return the names of the layouts, e.g. `R1-9x9`."""
    try:
        importlib.import_module("latentact.envs.xland_planner")  # before JAX, whose threads it sets
        import xminigrid
    except ModuleNotFoundError as error:
        raise missing_extra("xminigrid", "xland") from error
    names = xminigrid.registration.registered_environments()
    return [name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)]


@functools.cache
def _env_class() -> type[gym.Env]:
    gymnasium = import_gymnasium()

    class XLandEnv(gymnasium.Env):
        """A level as a Gymnasium environment; `timestep` is the true state."""

        def __init__(self, layout: _Layout, task: Task) -> None:
            self._layout, self._ruleset, self.timestep = layout, task.ruleset, None
            self.action_space = gymnasium.spaces.Discrete(len(ACTIONS))
            self.observation_space = gymnasium.spaces.Dict()

        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
            super().reset(seed=seed)
            drawn = int(self.np_random.integers(2**31)) if seed is None else seed
            self.timestep, out = self._layout.reset(self._ruleset, drawn)
            return {key: np.array(out[key]) for key in ("pixels", "state")}, {}

        def step(self, action: int):
            self.timestep, out = self._layout.step(self._ruleset, self.timestep, action)
            flags = [bool(out[key]) for key in ("terminated", "truncated")]
            observation = {key: np.array(out[key]) for key in ("pixels", "state")}
            return observation, float(out["reward"]), *flags, {}

    return XLandEnv
