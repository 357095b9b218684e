"""A planner for PushT: move around the block to the best straight push, push, replan.

Each push is simulated in a copy of the physics: start points evenly spaced along the block's outline, a few
directions each, cut at the step where the block is nearest to its goal. Objects do not slide in PushT, so the
final pose depends on the finger's path alone, not on its speed, and the plan is accurate. The plan depends on
the state alone unless no push lowers the cost; only then are pushes sampled. Nothing is learned.
"""

from __future__ import annotations

import cmath
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from latentact.envs.spec import Expert

if TYPE_CHECKING:
    import gymnasium as gym

FINGER = 15.0
"""Radius of the finger."""
CLEARANCE = 17.0
"""Minimum distance between the block and a straight path."""
CORNER = 25.0
"""Distance between the block and the corners of a path: the finger lags behind its target and cuts them."""
ARENA = (22.0, 490.0)
"""Range of the finger's center on both axes."""
EXPLORE = 24.0
"""Standard deviation of exploratory noise, in pixels of 512."""
WALK = 18.0
"""Largest step of the finger on a path, in pixels."""
PUSH = (2.0, 12.0)
"""Smallest and largest step of the finger while pushing; smaller near the goal."""
LEAD = 2.2
"""Distance between the finger and its target, in steps: it covers about 1 / LEAD of it in one."""
SMALLEST_LEAD = 4.0
"""Smallest distance in pixels between the finger and its target while pushing."""
ARRIVED = 3.0
"""Distance in pixels from the start of a push at which it begins."""
PASSED = 12.0
"""Distance in pixels from a corner of a path at which the next one is aimed at."""
OFF_LINE = 6.0
"""Distance in pixels between the finger and the line of its push at which the push is given up."""
FALLEN_BACK = 8.0
"""Distance in pixels behind the start of a push at which it is given up."""
BLOCK_MOVED = 2.0
"""Pixels by which the block may move before a push to it is planned anew."""
POSE_RADIUS = 60.0
"""Distance in pixels from the block's center at which a rotation counts as motion."""
TRAVEL = 0.0005
"""Cost per pixel of path to a push, times the current cost (up to 20): nearer pushes first."""
START_POINTS = 24
"""Number of contact points, evenly spaced along the block's outline."""
ANGLES = (-0.5, -0.25, 0.0, 0.25, 0.5)
"""Directions of a push, in radians from the outline's inward normal."""
RUN_UP = 6.0
"""Distance in pixels between the finger and the block before a push."""
PUSH_STEPS = 16
"""Maximum steps of a push."""
MIN_GAIN = 0.3
"""Minimum decrease of the cost, in pixels, by the best push."""
RANDOM_PUSHES = 60
"""Number of pushes sampled when no regular one lowers the cost."""
SUBSTEPS = 5
"""Physics steps per tenth of a second in the copy; the environment uses ten, with equal poses."""


@dataclass(frozen=True, kw_only=True)
class _Push:
    cost: float
    """Mean distance in pixels between the block's corners and their goal after the push."""
    score: float
    """Cost plus the cost of the path to the push; smaller is better."""
    start: np.ndarray
    """Position of the finger before the push `[2]`."""
    end: np.ndarray
    """Position of the finger after the push `[2]`."""
    step: float
    """Pixels per step of its target."""


class PushPlanner(Expert):
    """Expert for one episode of PushT; the same states and seed give the same actions.

    It acts in any state: every target is computed from the position of the finger, and a push is abandoned
    once block or finger have left the positions that it requires.
    """

    def __init__(self, env: gym.Env, seed: int) -> None:
        """Plan for an environment that was just reset.

        Args:
            env: what `make_env("pusht")` returned.
            seed: seed of sampled pushes.
        """
        self._world: Any = env.unwrapped
        self._shape = _Shape(self._world)
        self._copy = _Copy()
        self._rng = np.random.default_rng(seed)
        self._push: _Push | None = None
        self._pushing = False
        self._planned_for: np.ndarray = np.zeros(3)

    def act(self, explore: np.random.Generator | None = None) -> np.ndarray:
        """Return the next target of the finger, float32 `[2]`; with `explore`, with noise."""
        goal = self._target().astype(np.float32)
        if explore is None:
            return goal
        return np.clip(goal + explore.normal(0, EXPLORE, 2), 0, 512).astype(np.float32)

    def _target(self) -> np.ndarray:
        finger = np.array(self._world.agent.position)
        position, angle = np.array(self._world.block.position), float(self._world.block.angle)
        pose = np.array([*position, angle * POSE_RADIUS])
        push = self._push
        if push is None or not self._holds(push, finger, pose):
            push, path = self._plan(position, angle)
            self._push, self._pushing, self._planned_for = push, not path, pose
        if not self._pushing:
            self._pushing = bool(np.linalg.norm(push.start - finger) < ARRIVED)
        if self._pushing:
            return _towards(finger, push.end, max(LEAD * push.step, SMALLEST_LEAD))
        corners = self._shape.path(finger, push.start, position, angle)[1:] or [push.start]
        ahead = (corner for corner in corners if np.linalg.norm(corner - finger) > PASSED)
        return _towards(finger, next(ahead, corners[-1]), LEAD * WALK)

    def _holds(self, push: _Push, finger: np.ndarray, pose: np.ndarray) -> bool:
        """Return whether the push can go on: on its line and not at its end, or towards a still block."""
        if not self._pushing:
            return bool(np.abs(pose - self._planned_for).max() <= BLOCK_MOVED)
        length = float(np.linalg.norm(push.end - push.start)) + 1e-9
        along = (push.end - push.start) / length
        done, (x, y) = float((finger - push.start) @ along), finger - push.start
        return -FALLEN_BACK <= done <= length - 1 and bool(abs(along[0] * y - along[1] * x) <= OFF_LINE)

    def _plan(self, position: np.ndarray, angle: float) -> tuple[_Push, list[np.ndarray]]:
        """Return the best reachable push and the path to its start."""
        now = self._shape.cost(position, angle)
        finger = np.array(self._world.agent.position)
        pushes = self._simulated(self._shape.contacts(START_POINTS, ANGLES), position, angle, finger, now)
        if not pushes or pushes[0].cost > now - MIN_GAIN:
            sampled = self._shape.sampled_contacts(self._rng, RANDOM_PUSHES)
            pushes += self._simulated(sampled, position, angle, finger, now)
            pushes.sort(key=lambda push: push.score)
        for push in pushes:
            path = self._shape.path(finger, push.start, position, angle)
            if path:
                return push, path
        return self._step_aside(finger), []

    def _simulated(
        self, contacts: Any, position: np.ndarray, angle: float, finger: np.ndarray, now: float
    ) -> list[_Push]:
        turn = _turn(angle)
        pushes: list[_Push] = []
        for point, direction in contacts:
            start = (point - RUN_UP * direction) @ turn.T + position
            if start.min() < ARENA[0] or start.max() > ARENA[1]:
                continue
            step = float(np.clip(now / 4, *PUSH))
            cost, length = self._simulate(start, turn @ direction * step, position, angle)
            travel = float(np.linalg.norm(start - finger))
            pushes.append(
                _Push(
                    cost=cost,
                    score=cost + min(now, 20.0) * TRAVEL * travel,
                    start=start,
                    end=start + turn @ direction * step * length,
                    step=step,
                )
            )
        return sorted(pushes, key=lambda push: push.score)

    def _simulate(
        self, start: np.ndarray, step: np.ndarray, position: np.ndarray, angle: float
    ) -> tuple[float, int]:
        """Simulate one push in the copy; return its lowest cost and the number of steps to it."""
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
    """The block in its own coordinates: outline, obstacle, goal."""

    def __init__(self, world: Any) -> None:
        import shapely

        parts: Any = [
            shapely.Polygon([(v.x, v.y) for v in part.get_vertices()]) for part in world.block.shapes
        ]
        self.block = cast("Any", shapely.union_all(parts))
        x, y, angle = world.goal_pose
        self._corners = np.array(self.block.exterior.coords)[:-1] @ (1, 1j)
        self._goal = self._corners * cmath.exp(1j * angle) + complex(x, y)
        self.contact_line = self.block.buffer(FINGER + 0.5).exterior
        self.obstacle = self.block.buffer(CLEARANCE)
        self.nodes = np.array(self.block.buffer(CORNER, join_style="mitre").exterior.coords)[:-1]
        shapely.prepare([self.block, self.obstacle])

    def cost(self, position: Sequence[float] | np.ndarray, angle: float) -> float:
        """Return the mean distance in pixels between the corners and their goal, for a pose of the block."""
        moved = self._corners * cmath.exp(1j * angle) + complex(*position)
        return float(np.abs(moved - self._goal).mean())

    def contacts(self, points: int, angles: tuple[float, ...]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield contact points on the outline and push directions, in the block's coordinates."""
        for i in range(points):
            for angle in angles:
                yield self._contact(i / points, angle)

    def sampled_contacts(
        self, rng: np.random.Generator, count: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield `count` random contacts."""
        for _ in range(count):
            yield self._contact(rng.uniform(), rng.normal(0, 0.35))

    def _contact(self, fraction: float, angle: float) -> tuple[np.ndarray, np.ndarray]:
        import shapely

        touch = self.contact_line.interpolate(fraction, normalized=True)
        nearest = shapely.shortest_line(touch, self.block).coords
        inward = np.subtract(nearest[1], nearest[0])
        return np.array(touch.coords[0]), _turn(angle) @ inward / np.linalg.norm(inward)

    def path(
        self, start: np.ndarray, goal: np.ndarray, position: np.ndarray, angle: float
    ) -> list[np.ndarray]:
        """Return the corners of the shortest path around the block, ends included; empty if there is none."""
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
        """Return the point, moved away from the block if it is too close for a path."""
        import shapely

        here = shapely.Point(point)
        if not self.obstacle.intersects(here):
            return point
        edge = shapely.shortest_line(self.obstacle.exterior, here).coords[0]
        away = np.subtract(edge, point)
        return np.array(edge) + 0.5 * away / (np.linalg.norm(away) + 1e-9)


class _Copy:
    """A copy of the environment's physics to simulate pushes."""

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
        """Set the positions of finger and block, at rest."""
        self.finger.position, self.finger.velocity = tuple(finger.tolist()), (0, 0)
        self.block.velocity, self.block.angular_velocity = (0, 0), 0
        self.block.angle = angle  # before the position: rotation is about the center of gravity
        self.block.position = tuple(position.tolist())
        self.space.reindex_shapes_for_body(self.block)
        self.space.reindex_shapes_for_body(self.finger)

    def move(self, step: np.ndarray) -> tuple[float, float]:
        """Move the finger by `step` within a tenth of a second; return its position."""
        self.finger.velocity = tuple((step * 10).tolist())
        for _ in range(SUBSTEPS):
            self.space.step(0.1 / SUBSTEPS)
        return self.finger.position


def _towards(finger: np.ndarray, goal: np.ndarray, step: float) -> np.ndarray:
    """Return the point at most `step` pixels from the finger on the way to the goal."""
    way = goal - finger
    distance = float(np.linalg.norm(way))
    return goal if distance <= step else finger + way / distance * step


def _turn(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s], [s, c]])


def _shortest(links: dict[int, list[tuple[int, float]]], start: int, goal: int) -> list[int]:
    """Return the nodes of the shortest path (Dijkstra), both ends included; empty if there is none."""
    queue, came, visited = [(0.0, start, start)], {}, set()
    while queue:
        length, node, before = heapq.heappop(queue)
        if node in visited:
            continue
        visited.add(node)
        came[node] = before
        if node == goal:
            path = [goal]
            while path[-1] != start:
                path.append(came[path[-1]])
            return path[::-1]
        for other, more in links[node]:
            heapq.heappush(queue, (length + more, other, node))
    return []
