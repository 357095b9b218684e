"""Procgen: 16 games with generated levels, 64x64 pixels (Cobbe et al., 2020; package envpool).

`procgen/GAME` has easy levels, `procgen/GAME-hard` hard ones; the reset seed is the level's seed.
`procgen/GAME/SEED` always plays that level. The same level and actions give the same frames. Actions are
those of openai/procgen and of LAPO's data. The expert of maze explores a level before it acts.
"""

from __future__ import annotations

import collections
import functools
import importlib.util
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from latentact.envs.adapt import adapt
from latentact.envs.boundary import env_errors, import_gymnasium
from latentact.envs.spec import ENVS, EnvSpec, Expert, ExpertStuckError
from latentact.errors import UserError, did_you_mean, missing_extra
from latentact.types import ActionSpace

if TYPE_CHECKING:
    import gymnasium as gym

GAMES = (
    *("bigfish", "bossfight", "caveflyer", "chaser", "climber", "coinrun", "dodgeball", "fruitbot"),
    *("heist", "jumper", "leaper", "maze", "miner", "ninja", "plunder", "starpilot"),
)
ACTIONS = (
    *("left_down", "left", "left_up", "down", "wait", "up", "right_down", "right", "right_up"),
    *("d", "a", "w", "s", "q", "e"),
)
"""Nine moves and six keys, whose meaning depends on the game."""
MOVES = tuple(ACTIONS.index(name) for name in ("left", "down", "up", "right"))
"""Moves that the maze planner uses."""
LARGEST_LEVEL = 2**31 - 1
GOAL = b""
"""In place of the state at the goal, where episodes end."""


@ENVS.register("procgen")
class Procgen:
    """The games `GAME` and `GAME-hard`, also with the seed of a level: `GAME/SEED`."""

    def check(self, name: str) -> None:
        """Raise a UserError if there is no such game, or envpool is not installed."""
        game, level = _parts(name)
        if game.removesuffix("-hard") not in GAMES:
            raise UserError(
                f"unknown Procgen game {game!r}{did_you_mean(game, GAMES)} For hard levels, append -hard, as "
                "in procgen/maze-hard."
            )
        if level and not (re.fullmatch(r"0|[1-9]\d{0,9}", level) and int(level) <= LARGEST_LEVEL):
            raise UserError(
                f"the level of {name} must be a seed from 0 to {LARGEST_LEVEL}, got {level!r}. Give one such "
                f"as procgen/{game}/7, or procgen/{game} for the levels of the reset seeds."
            )
        if importlib.util.find_spec("envpool") is None:
            raise missing_extra("envpool", "procgen")

    def spec(self, name: str, view: str) -> EnvSpec:
        """Return the specification, which all games share."""
        return EnvSpec(
            name=name,
            fps=15,
            camera="observation.images.camera",
            action_space=ActionSpace(kind="discrete", size=len(ACTIONS)),
            action_names=ACTIONS,
            state_names=(),
            hold=ACTIONS.index("wait"),
        )

    def make(self, name: str, resolution: int, view: str) -> gym.Env:
        """Return the game; both views are its one image."""
        game, level = _parts(name)
        with env_errors(name, "to be made"):
            env = _env_class()(game, int(level) if level else None)  # type: ignore[call-arg]
        return adapt(
            env,
            name=name,
            pixels=lambda frame: frame,
            resolution=resolution,
            success=lambda reward, terminated, info: terminated and bool(info["prev_level_complete"]),
            heading=lambda action: _heading(int(action)),
        )

    def expert(self, name: str, env: gym.Env, seed: int) -> Expert:
        """Return the planner of mazes, which makes no random choices.

        Raises:
            UserError: the game is another.
        """
        if _parts(name)[0].removesuffix("-hard") != "maze":
            raise UserError(
                f"{name} must be procgen/maze or procgen/maze-hard for demonstrations, because only these "
                "games have an expert. Choose one of them, or use a dataset such as LAPO's expert_data."
            )
        return _MazePlanner(env.unwrapped)


class _MazePlanner(Expert):
    """Explores every reachable state once, then plans shortest paths to the goal.

    A maze is deterministic; its state is the frame and the direction that the mouse faces, which a frame may
    not show.
    """

    def __init__(self, env: Any) -> None:
        self._env = env
        self._next = _ways(env.game, env.level)

    def act(self, explore: np.random.Generator | None = None) -> int:
        if explore is not None:
            return int(explore.choice(MOVES))
        action = self._next.get(_state(self._env.frame, self._env.left))
        if action is None:
            raise ExpertStuckError("there is no path to the goal")
        return action


def _ways(game: str, level: int) -> dict[bytes, int]:
    """Return the move on the shortest path to the goal, by state."""
    pool = _pool(game, level)
    here = root = _state(pool.reset()[0][0], True)
    left = True
    after: dict[bytes, dict[int, bytes]] = {here: {}}
    """State -> move -> next state."""
    while (way := _to_untried(after, here)) is not None:
        for move in way:
            frames, (reward,), (terminated,), (truncated,), _ = pool.step(np.array([move], np.int32))
            left = _left(left, move)
            if reward > 0 or not (terminated or truncated):
                before, here = here, GOAL if reward > 0 else _state(frames[0], left)
                after[before][move] = here
                after.setdefault(here, {})
            if terminated or truncated:  # also out of time
                pool.reset()
                here, left = root, True
                break
    pool.close()
    return _next_moves(after)


def _state(frame: np.ndarray, left: bool) -> bytes:
    return bytes([left]) + frame.tobytes()


def _left(before: bool, action: int) -> bool:
    """Return whether the mouse faces left after an action."""
    across = _heading(action)[0]
    return bool(across < 0) if across else before


def _to_untried(after: dict[bytes, dict[int, bytes]], start: bytes) -> list[int] | None:
    """Return the moves to the nearest state with an untried move, and that move; None: all are tried."""
    ways: dict[bytes, list[int]] = {start: []}
    queue = collections.deque([start])
    while queue:
        state = queue.popleft()
        untried = [move for move in MOVES if move not in after[state]]
        if untried:
            return [*ways[state], untried[0]]
        for move, reached in after[state].items():
            if reached != GOAL and reached not in ways:
                ways[reached] = [*ways[state], move]
                queue.append(reached)
    return None


def _next_moves(after: dict[bytes, dict[int, bytes]]) -> dict[bytes, int]:
    """Return the first move of a shortest path to the goal, for every state that has one."""
    sources: dict[bytes, list[tuple[bytes, int]]] = collections.defaultdict(list)
    for state, moves in after.items():
        for move, reached in moves.items():
            sources[reached].append((state, move))
    first: dict[bytes, int] = {}
    queue = collections.deque([GOAL])
    while queue:
        for state, move in sources[queue.popleft()]:
            if state not in first:
                first[state] = move
                queue.append(state)
    return first


def _parts(name: str) -> tuple[str, str]:
    """Return game, with its distribution, and level ("": that of the reset seed)."""
    game, _, level = name.partition("/")[2].partition("/")
    return game, level


def _heading(action: int) -> np.ndarray:
    """Return the direction `[2]` of a move, to the right and down; other actions have none."""
    across, up = divmod(action, 3) if action < 9 else (1, 1)
    return 1.2 * np.array([across - 1.0, 1.0 - up])


def _pool(game: str, level: int) -> Any:
    """Return envpool's environment of one level."""
    import envpool

    name, _, hard = game.partition("-")
    return envpool.make_gymnasium(
        f"{name.capitalize()}{'Hard' if hard else 'Easy'}-v0",
        num_envs=1,
        num_threads=1,
        num_levels=1,
        start_level=level,
        channel_first=False,
    )


@functools.cache
def _env_class() -> type[gym.Env]:
    gymnasium = import_gymnasium()

    class ProcgenEnv(gymnasium.Env):
        """A game as a Gymnasium environment; `left` is whether the mouse of maze faces left."""

        def __init__(self, game: str, level: int | None) -> None:
            self.game, self._fixed = game, level
            self.level, self.frame, self.left = 0, np.zeros((64, 64, 3), np.uint8), True
            self.action_space = gymnasium.spaces.Discrete(len(ACTIONS))
            self.observation_space = gymnasium.spaces.Box(0, 255, (64, 64, 3), np.uint8)
            self._pool: Any = None

        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
            super().reset(seed=seed)
            drawn = int(self.np_random.integers(LARGEST_LEVEL)) if seed is None else seed
            self.level = drawn % (LARGEST_LEVEL + 1) if self._fixed is None else self._fixed
            self.close()
            self._pool = _pool(self.game, self.level)
            frames, info = self._pool.reset()
            self.frame, self.left = frames[0].copy(), True
            return self.frame, _single(info)

        def step(self, action: int):
            frames, rewards, ends, cuts, info = self._pool.step(np.array([action], np.int32))
            self.frame, self.left = frames[0].copy(), _left(self.left, action)
            return self.frame, float(rewards[0]), bool(ends[0]), bool(cuts[0]), _single(info)

        def close(self) -> None:
            if self._pool is not None:
                self._pool.close()
            self._pool = None

    return ProcgenEnv


def _single(info: dict[str, Any]) -> dict[str, Any]:
    """Return the info of the one environment."""
    return {key: info[key][0] for key in ("level_seed", "prev_level_complete")}
