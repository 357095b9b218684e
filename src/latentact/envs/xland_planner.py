"""Rulesets of XLand-MiniGrid by seed, and a planner that knows the true state, in JAX.

A ruleset is "trivial" in the words of its authors (arXiv 2312.12044): a goal, no rules, three distractors.
The planner computes at every step how far each pose (row, column, heading) is from those where one action
ends the task, or lifts or lowers the right tile. Importing this module pins JAX to one thread of the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import jax
import jax.numpy as jnp
import numpy as np
from xminigrid.core.constants import FREE_TO_PUT_DOWN, WALKABLE, Tiles
from xminigrid.core.rules import EmptyRule
from xminigrid.types import RuleSet

FORWARD, RIGHT, LEFT, PICK_UP, PUT_DOWN, TOGGLE = range(6)
TILES = {3: "ball", 4: "square", 5: "pyramid", 7: "key", 11: "hexagon", 12: "star"}
COLORS = {
    1: "red", 2: "green", 3: "blue", 4: "purple", 5: "yellow",
    6: "gray", 8: "orange", 9: "white", 10: "brown", 11: "pink",
}  # fmt: skip
GOALS = {
    1: "hold the {a}",
    3: "step next to the {a}",
    11: "step below the {a}",
    12: "step to the left of the {a}",
    13: "step above the {a}",
    14: "step to the right of the {a}",
    4: "put the {a} next to the {b}",
    7: "put the {a} below the {b}",
    8: "put the {a} to the left of the {b}",
    9: "put the {a} above the {b}",
    10: "put the {a} to the right of the {b}",
}
"""Goal of XLand-MiniGrid -> task text."""
DISTRACTORS = 3
SIDES = np.zeros((2, 15, 4), bool)
"""Sides (up, right, down, left) on which the agent, or tile a, must have the other tile, by goal."""
for _agent, _tiles, _sides in ((3, 4, range(4)), (11, 7, [0]), (12, 8, [1]), (13, 9, [2]), (14, 10, [3])):
    SIDES[0, _agent, _sides] = SIDES[1, _tiles, _sides] = True
FAR = 10_000
"""Distance of poses from which there is no way."""


@dataclass(frozen=True)
class Task:
    """A ruleset."""

    goal: np.ndarray
    """Encoded goal, uint8 `[5]`."""
    tiles: np.ndarray
    """Tile and color of what lies in the grid at first, uint8 `[n, 2]`."""
    text: str
    """The goal in words."""

    @property
    def ruleset(self) -> RuleSet:
        """The ruleset of XLand-MiniGrid."""
        return RuleSet(
            goal=jnp.array(self.goal), rules=EmptyRule().encode()[None], init_tiles=jnp.array(self.tiles)
        )


def make_task(seed: int) -> Task:
    """Return the ruleset of a seed."""
    rng = np.random.default_rng(seed)
    kind = int(rng.choice(list(GOALS)))
    kinds = [(tile, color) for tile in TILES for color in COLORS]
    needed = 2 if "{b}" in GOALS[kind] else 1
    chosen = [kinds[i] for i in rng.choice(len(kinds), needed + DISTRACTORS, replace=False)]
    goal = np.zeros(5, np.uint8)
    goal[: 1 + 2 * needed] = [kind, *np.ravel(chosen[:needed])]
    tiles = np.zeros((2 + DISTRACTORS, 2), np.uint8)
    tiles[: len(chosen)] = chosen
    a, b = (f"{COLORS[color]} {TILES[tile]}" for tile, color in chosen[:2])
    return Task(goal=goal, tiles=tiles, text=GOALS[kind].format(a=a, b=b))


def plan(state: Any) -> tuple[jax.Array, jax.Array]:
    """Return the first action of a shortest way to the next subgoal, and whether there is a way."""
    grid, agent = state.grid, state.agent
    (y, x), d = agent.position, agent.direction
    closed = grid[..., 0] == Tiles.DOOR_CLOSED
    walk = jnp.isin(grid[..., 0], WALKABLE) | closed
    start = jnp.zeros_like(walk).at[y, x].set(True)
    region = _until_still(lambda region: region | (walk & _in_front(region).any(-1)), start)
    target, last = _subgoal(grid, region, agent.pocket, state.goal_encoding)

    def ahead(distance: jax.Array) -> jax.Array:
        """Return the distance after a step forward; a closed door costs another step."""
        steps = [jnp.where(_beyond(walk, d), _beyond(distance[..., d] + closed, d), FAR) for d in range(4)]
        return jnp.stack(steps, -1)

    def nearer(distance: jax.Array) -> jax.Array:
        turned = jnp.minimum(jnp.roll(distance, -1, -1), jnp.roll(distance, 1, -1))
        return jnp.minimum(distance, 1 + jnp.minimum(ahead(distance), turned))

    distance = _until_still(nearer, jnp.where(_in_front(target), 0, FAR))
    ways = [ahead(distance)[y, x, d], distance[y, x, (d + 1) % 4], distance[y, x, (d - 1) % 4]]
    forward = jnp.where(_in_front(closed)[y, x, d], TOGGLE, FORWARD)
    onward = jnp.stack([forward, jnp.array(RIGHT), jnp.array(LEFT)])[jnp.stack(ways).argmin()]
    return jnp.where(distance[y, x, d] == 0, last, onward), distance[y, x, d] < FAR


def _subgoal(
    grid: jax.Array, region: jax.Array, pocket: jax.Array, goal: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the cells `[h, w]` to act on from in front of them, and the action.

    A tile is lifted if it is to be held or put elsewhere, or if no cell next to it can be reached; it is put
    down where the goal requires it, or first in the open. Other tiles that are carried are put down.

    Args:
        grid: tile and color of each cell `[h, w, 2]`.
        region: cells that the agent can reach `[h, w]`.
        pocket: tile and color that it carries.
        goal: encoded goal.
    """
    touched = _in_front(region).any(-1)
    floor = jnp.isin(grid[..., 0], FREE_TO_PUT_DOWN)
    tiles = [(grid == tile).all(-1) & touched for tile in (goal[1:3], goal[3:5])]
    agent_sides, tile_sides = (jnp.array(sides)[goal[0]] for sides in SIDES)
    cells = region & (grid[..., 0] != Tiles.DOOR_CLOSED) & _beside(tiles[0], agent_sides)
    spots = [floor & touched & _beside(tiles[1], tile_sides)]  # for the first tile, and for the second
    spots += [floor & touched & _beside(tiles[0], jnp.roll(tile_sides, 2))]

    lifted = (tiles[0] & spots[0].any()) | (tiles[1] & spots[1].any())
    lifted = jnp.where(lifted.any(), lifted, tiles[0] | tiles[1])
    put = (spots[0] & (pocket == goal[1:3]).all()) | (spots[1] & (pocket == goal[3:5]).all())
    in_the_open = floor & touched & _in_front(floor).all(-1)
    put = jnp.where(put.any(), put, in_the_open)

    lift = (goal[0] == 1) | tile_sides.any() | ~cells.any()
    target = jnp.where(pocket[0] != 0, put, jnp.where(lift, lifted, cells))
    return target, jnp.where(pocket[0] != 0, PUT_DOWN, jnp.where(lift, PICK_UP, FORWARD))


def _until_still(function: Callable[[jax.Array], jax.Array], start: jax.Array) -> jax.Array:
    """Apply a function until it changes nothing more."""
    last, _ = jax.lax.while_loop(
        lambda pair: (pair[0] != pair[1]).any(),
        lambda pair: (function(pair[0]), pair[0]),
        (function(start), start),
    )
    return last


def _beyond(cells: jax.Array, d: int) -> jax.Array:
    """Return for each cell the value of the next one in direction d (up, right, down, left)."""
    dy, dx = ((-1, 0), (0, 1), (1, 0), (0, -1))[d]
    return jnp.roll(cells, (-dy, -dx), (0, 1))


def _in_front(cells: jax.Array) -> jax.Array:
    """Return for each pose the value of the cell in front."""
    return jnp.stack([_beyond(cells, d) for d in range(4)], -1)


def _beside(mask: jax.Array, sides: jax.Array) -> jax.Array:
    """Return the cells that have a cell of the mask on one of their sides `[4]`."""
    return (_in_front(mask) & sides).any(-1)
