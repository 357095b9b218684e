"""A planner for PushT: walk around the block to where one straight push helps most, push, look again.

Every push is tried in a copy of the physics: start points spaced evenly along the block's outline, a few
directions each, cut where the block is nearest to its place. Nothing glides in PushT, so where the block ends
depends on the finger's way alone, not on its speed, and the plan comes true. The choice depends on the state
alone unless no push helps; only then are pushes drawn at random. Nothing is learned.
"""

from __future__ import annotations

import cmath
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import gymnasium as gym

FINGER = 15.0
"""Radius of the finger."""
CLEARANCE = 17.0
"""Distance from the block that a straight way must keep."""
CORNER = 25.0
"""Distance from the block of the corners of a way: the finger lags behind its target and cuts them."""
ARENA = (22.0, 490.0)
"""Where the finger's center may be, on both axes."""
EXPLORE = 24.0
"""Standard deviation of exploring moves, in pixels of 512."""
WALK = 18.0
"""Largest step of the target while walking, in pixels."""
PUSH = (2.0, 12.0)
"""Smallest and largest step of the target while pushing; smaller the nearer the block is to its place."""
TRAVEL = 0.0005
"""What a pixel of way to a push costs, times the present cost (up to 20): nearer pushes first."""
START_POINTS = 24
"""Where pushes are tried, evenly spaced along the block's outline."""
ANGLES = (-0.5, -0.25, 0.0, 0.25, 0.5)
"""Directions of a push, in radians from the outline's inward normal."""
RUN_UP = 6.0
"""Distance in pixels between the finger and the block before a push."""
PUSH_STEPS = 16
"""Steps of the longest push."""
HELPS = 0.3
"""Pixels by which the best planned push must lower the cost."""
RANDOM_PUSHES = 60
"""Pushes that are drawn when none of the planned ones helps."""
SUBSTEPS = 5
"""Physics steps per tenth of a second in the copy; the environment's ten give the same poses, slower."""


@dataclass(frozen=True, kw_only=True)
class _Push:
    cost: float
    """Mean distance in pixels of the block's corners from their place after the push."""
    score: float
    """Cost plus what the way there is worth; smaller is better."""
    start: np.ndarray
    """Where the finger stands before the push `[2]`."""
    end: np.ndarray
    """Where it stands after the push `[2]`."""
    step: float
    """Pixels that its target moves per step."""


class PushPlanner:
    """Expert for one episode of PushT; the same state and seed give the same actions."""

    def __init__(self, env: gym.Env, seed: int) -> None:
        """Look at the environment, which was just reset.

        Args:
            env: what `make_env("pusht")` returned.
            seed: of the pushes that are drawn when no planned push helps.
        """
        self._world: Any = env.unwrapped
        self._shape = _Shape(self._world)
        self._copy = _Copy()
        self._rng = np.random.default_rng(seed)
        self._actions = self._play()

    def act(self, explore: np.random.Generator | None = None) -> np.ndarray:
        """Return where the finger should go next, float32 `[2]`; with `explore`, near there."""
        goal = np.asarray(next(self._actions), np.float32)
        if explore is None:
            return goal
        return np.clip(goal + explore.normal(0, EXPLORE, 2), 0, 512).astype(np.float32)

    def _play(self) -> Iterator[np.ndarray]:
        while True:
            position, angle = np.array(self._world.block.position), float(self._world.block.angle)
            push, way = self._choose(position, angle)
            for corner in way:
                yield from self._walk(corner, WALK)
            yield from self._settle(push.start, 2.0)
            yield from self._walk(push.end, push.step)
            yield from self._settle(push.end, 1.0)

    def _walk(self, goal: np.ndarray, step: float) -> Iterator[np.ndarray]:
        target = np.array(self._world.agent.position)
        while (distance := np.linalg.norm(goal - target)) > step:
            target = target + (goal - target) / distance * step
            yield target
        yield goal

    def _settle(self, goal: np.ndarray, distance: float) -> Iterator[np.ndarray]:
        """Wait until the finger, which lags behind its target, is there."""
        for _ in range(6):
            if np.linalg.norm(goal - np.array(self._world.agent.position)) < distance:
                return
            yield goal

    def _choose(self, position: np.ndarray, angle: float) -> tuple[_Push, list[np.ndarray]]:
        """Return the best push that can be reached and the way to its start."""
        now = self._shape.cost(position, angle)
        finger = np.array(self._world.agent.position)
        pushes = self._tried(self._shape.contacts(START_POINTS, ANGLES), position, angle, finger, now)
        if not pushes or pushes[0].cost > now - HELPS:
            drawn = self._shape.drawn_contacts(self._rng, RANDOM_PUSHES)
            pushes += self._tried(drawn, position, angle, finger, now)
            pushes.sort(key=lambda push: push.score)
        for push in pushes:
            way = self._shape.way(finger, push.start, position, angle)
            if way:
                return push, way
        return self._step_aside(finger), []

    def _tried(
        self, contacts: Any, position: np.ndarray, angle: float, finger: np.ndarray, now: float
    ) -> list[_Push]:
        turn = _turn(angle)
        tried = []
        for point, direction in contacts:
            start = (point - RUN_UP * direction) @ turn.T + position
            if start.min() < ARENA[0] or start.max() > ARENA[1]:
                continue
            step = float(np.clip(now / 4, *PUSH))
            cost, length = self._roll(start, turn @ direction * step, position, angle)
            travel = float(np.linalg.norm(start - finger))
            tried.append(
                _Push(
                    cost=cost,
                    score=cost + min(now, 20.0) * TRAVEL * travel,
                    start=start,
                    end=start + turn @ direction * step * length,
                    step=step,
                )
            )
        return sorted(tried, key=lambda push: push.score)

    def _roll(
        self, start: np.ndarray, step: np.ndarray, position: np.ndarray, angle: float
    ) -> tuple[float, int]:
        """Play one push in the copy; return the lowest cost on its way and after how many steps."""
        self._copy.place(start, position, angle)
        costs = [np.inf]
        for _ in range(PUSH_STEPS):
            x, y = self._copy.move(step)
            if not (16 < x < 496 and 16 < y < 496):
                break
            costs.append(self._shape.cost(self._copy.block.position, self._copy.block.angle))
            if len(costs) > 5 and costs[-1] > min(costs) + 4:
                break
        best = int(np.argmin(costs))
        return costs[best], best

    def _step_aside(self, finger: np.ndarray) -> _Push:
        target = np.clip(finger + self._rng.normal(0, 20, 2), *ARENA)
        return _Push(cost=np.inf, score=np.inf, start=finger, end=target, step=WALK)


class _Shape:
    """The block in its own frame: outline, obstacle, goal."""

    def __init__(self, world: Any) -> None:
        import shapely

        parts: Any = [
            shapely.Polygon([(v.x, v.y) for v in part.get_vertices()]) for part in world.block.shapes
        ]
        self.block: Any = shapely.union_all(parts)
        x, y, angle = world.goal_pose
        self._corners = np.array(self.block.exterior.coords)[:-1] @ (1, 1j)
        self._goal = self._corners * cmath.exp(1j * angle) + complex(x, y)
        self.contact_line = self.block.buffer(FINGER + 0.5).exterior
        self.obstacle = self.block.buffer(CLEARANCE)
        self.nodes = np.array(self.block.buffer(CORNER, join_style="mitre").exterior.coords)[:-1]
        shapely.prepare([self.block, self.obstacle])

    def cost(self, position: Sequence[float] | np.ndarray, angle: float) -> float:
        """Return the mean distance in pixels of the corners from their place, for a pose of the block."""
        moved = self._corners * cmath.exp(1j * angle) + complex(*position)
        return float(np.abs(moved - self._goal).mean())

    def contacts(self, points: int, angles: tuple[float, ...]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield where the finger touches the outline and a direction to push in, in the block's frame."""
        for i in range(points):
            for angle in angles:
                yield self._contact(i / points, angle)

    def drawn_contacts(self, rng: np.random.Generator, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield `count` random contacts."""
        for _ in range(count):
            yield self._contact(rng.uniform(), rng.normal(0, 0.35))

    def _contact(self, share: float, angle: float) -> tuple[np.ndarray, np.ndarray]:
        import shapely

        touch = self.contact_line.interpolate(share, normalized=True)
        nearest = shapely.shortest_line(touch, self.block).coords
        inward = np.subtract(nearest[1], nearest[0])
        return np.array(touch.coords[0]), _turn(angle) @ inward / np.linalg.norm(inward)

    def way(
        self, start: np.ndarray, goal: np.ndarray, position: np.ndarray, angle: float
    ) -> list[np.ndarray]:
        """Return the corners of the shortest way around the block, ends included; empty: there is none."""
        import shapely

        turn = _turn(angle)
        corners = self.nodes @ turn.T + position
        inside = ((corners > ARENA[0]) & (corners < ARENA[1])).all(1)
        points = np.vstack(
            [self._outside((start - position) @ turn), (goal - position) @ turn, self.nodes[inside]]
        )
        a, b = np.triu_indices(len(points), 1)
        free = ~shapely.intersects(self.obstacle, shapely.linestrings(np.stack([points[a], points[b]], 1)))
        links: dict[int, list[tuple[int, float]]] = {i: [] for i in range(len(points))}
        for i, j in zip(a[free].tolist(), b[free].tolist(), strict=True):
            length = float(np.linalg.norm(points[i] - points[j]))
            links[i].append((j, length))
            links[j].append((i, length))
        return [points[i] @ turn.T + position for i in _shortest(links, 0, 1)]

    def _outside(self, point: np.ndarray) -> np.ndarray:
        """Return the point, moved away from the block where it is too close to walk."""
        import shapely

        here = shapely.Point(point)
        if not self.obstacle.intersects(here):
            return point
        edge = shapely.shortest_line(self.obstacle.exterior, here).coords[0]
        away = np.subtract(edge, point)
        return np.array(edge) + 0.5 * away / (np.linalg.norm(away) + 1e-9)


class _Copy:
    """The environment's physics without the environment, to try pushes in."""

    def __init__(self) -> None:
        import pymunk
        from gym_pusht.envs.pusht import PushTEnv

        self.space = pymunk.Space()
        self.space.damping = 0
        corners = [(5, 506), (5, 5), (506, 5), (506, 506), (5, 506)]
        for a, b in pairwise(corners):
            self.space.add(PushTEnv.add_segment(self.space, a, b, 2))
        self.finger = PushTEnv.add_circle(self.space, (256, 400), FINGER)
        self.block, _ = PushTEnv.add_tee(self.space, (256, 300), 0)

    def place(self, finger: np.ndarray, position: np.ndarray, angle: float) -> None:
        """Put finger and block somewhere, at rest."""
        self.finger.position, self.finger.velocity = tuple(finger.tolist()), (0, 0)
        self.block.velocity, self.block.angular_velocity = (0, 0), 0
        self.block.angle = (
            angle  # before the position: turning is about the center of gravity, not the origin
        )
        self.block.position = tuple(position.tolist())
        self.space.reindex_shapes_for_body(self.block)
        self.space.reindex_shapes_for_body(self.finger)

    def move(self, step: np.ndarray) -> tuple[float, float]:
        """Move the finger by `step` within a tenth of a second; return where it is."""
        self.finger.velocity = tuple((step * 10).tolist())
        for _ in range(SUBSTEPS):
            self.space.step(0.1 / SUBSTEPS)
        return self.finger.position


def _turn(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s], [s, c]])


def _shortest(links: dict[int, list[tuple[int, float]]], start: int, goal: int) -> list[int]:
    """Return the nodes of the shortest way, both ends included; empty where there is none (Dijkstra)."""
    queue, came, done = [(0.0, start, start)], {}, set()
    while queue:
        length, node, before = heapq.heappop(queue)
        if node in done:
            continue
        done.add(node)
        came[node] = before
        if node == goal:
            way = [goal]
            while way[-1] != start:
                way.append(came[way[-1]])
            return way[::-1]
        for other, more in links[node]:
            heapq.heappush(queue, (length + more, other, node))
    return []
