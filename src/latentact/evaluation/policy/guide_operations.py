"""Measure whether rollouts follow edited guides, with a verdict for each operation.

Paths are positions of the agent, `[t + 1, 2]` in the environment's units; row i is the state before action i.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from latentact.evaluation.policy.intervals import mean_interval

CLAIMS = {
    "blend": "The rollout of a blend lies between those of its parents.",
    "interpolate": "At 0 and 1 an interpolation reproduces its parents.",
    "concat": "After the transition the rollout reaches the second demonstration's path.",
    "replace": "Replacing a segment changes the motion in that segment only.",
    "scale": "Scaled by 0, the agent stands still.",
}
"""Operation -> what is checked."""
EXACT = 1e-6
"""Distance up to which two rollouts are the same."""
POINTS = 101
"""Points at which paths of different durations are compared, at equal fractions of their time."""


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """The paths from one start state; `a` and `b` are those of the unedited guides."""

    paths: Mapping[str, Float[np.ndarray, "_ 2"]]
    """Paths of a, b, blend, start and end (interpolation at 0 and 1), concat, replace and scale."""
    second: Float[np.ndarray, "u1 2"]
    """Path of the demonstration of b, from its own start state."""
    first_end: int
    """Step at which concat's first guide ends."""
    second_start: int
    """Step at which its second guide starts."""
    segment: range
    """Steps of a that are replaced in `replace`."""
    horizon: int
    """Steps ahead that the policy reads its guide."""


def measure(rollouts: Rollouts) -> dict[str, dict[str, float] | None]:
    """Return numbers of each operation; None where an episode ended before there was anything to measure.

    `margin` is at least 0 if the claim holds:

    - blend: distance between the parents minus that to the farther parent, at equal fractions of time;
    - interpolate: `EXACT` minus the largest distance to the parents;
    - concat: half of the distance if the agent had stayed where the first guide ended, minus the distance to
      the second path;
    - replace: half of the change of motion inside the segment, minus that after it; the steps before it
      must be the same;
    - scale: a tenth of the unedited distance from the start, minus that when scaled.
    """
    paths = rollouts.paths
    apart = _apart(paths["a"], paths["b"])
    to_first, to_second = (_apart(paths["blend"], paths[name]) for name in "ab")
    largest = max(_largest(paths["start"], paths["a"]), _largest(paths["end"], paths["b"]))
    moved, still = (_mean(paths[name] - paths[name][0]) for name in ("a", "scale"))
    return {
        "blend": {
            "to_first": to_first,
            "to_second": to_second,
            "parents": apart,
            "margin": apart - max(to_first, to_second),
        },
        "interpolate": {"largest": largest, "margin": EXACT - largest},
        "concat": _joined(rollouts),
        "replace": _replaced(rollouts),
        "scale": {"moved": moved, "still": still, "margin": moved / 10 - still},
    }


def _joined(rollouts: Rollouts) -> dict[str, float] | None:
    path, start = rollouts.paths["concat"], rollouts.second_start
    count = min(len(path) - start, len(rollouts.second))
    if count < 1:
        return None
    joined, second = path[start : start + count], rollouts.second[:count]
    distance, stayed = _mean(joined - second), _mean(path[rollouts.first_end] - second)
    shape = _mean((joined - joined[0]) - (second - second[0]))
    return {"distance": distance, "stayed": stayed, "shape": shape, "margin": stayed / 2 - distance}


def _replaced(rollouts: Rollouts) -> dict[str, float] | None:
    count = min(len(rollouts.paths[name]) for name in ("a", "replace"))
    a, edited = (rollouts.paths[name][:count] for name in ("a", "replace"))
    first = max(0, rollouts.segment.start - rollouts.horizon)
    last = rollouts.segment.stop + rollouts.horizon
    change = np.linalg.norm(np.diff(a, axis=0) - np.diff(edited, axis=0), axis=1)
    if len(change) <= last:
        return None
    before, inside, after = (
        _largest(a[: first + 1], edited[: first + 1]),
        float(change[first:last].mean()),
        float(change[last:].mean()),
    )
    margin = inside / 2 - after if before <= EXACT else -before
    path = _mean(a[last:] - edited[last:])
    return {"before": before, "inside": inside, "after": after, "path": path, "margin": margin}


def evaluate(rows: Sequence[Mapping[str, Mapping[str, float] | None]]) -> dict[str, dict[str, Any]]:
    """Return for each operation whether its claim holds, means with 95 % intervals, and a sentence.

    It holds if the interval of the mean margin lies at or above 0.

    Args:
        rows: results of `measure`.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, claim in CLAIMS.items():
        measured = [numbers for row in rows if (numbers := row[name]) is not None]
        numbers = {
            key: {
                "mean": float(np.mean([each[key] for each in measured])),
                "ci95": mean_interval([each[key] for each in measured]),
            }
            for key in (measured[0] if measured else ())
        }
        passes = bool(measured) and numbers["margin"]["ci95"][0] >= 0
        sentence = claim if passes else f"Not with this LAM and policy: {claim[0].lower()}{claim[1:]}"
        if not measured:
            sentence = f"Not measured, because every rollout ended early: {claim[0].lower()}{claim[1:]}"
        found[name] = {
            "passes": passes,
            "pairs": len(measured),
            "verdict": sentence,
            "numbers": numbers,
        }
    return found


def _mean(offsets: np.ndarray) -> float:
    return float(np.linalg.norm(offsets, axis=-1).mean())


def _largest(a: np.ndarray, b: np.ndarray) -> float:
    """Return the largest distance at the same timesteps."""
    count = min(len(a), len(b))
    return float(np.linalg.norm(a[:count] - b[:count], axis=1).max())


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    """Return the mean distance at equal fractions of time."""
    part = np.linspace(0, 1, POINTS)
    (x, y) = (
        np.stack([np.interp(part * (len(path) - 1), np.arange(len(path)), path[:, i]) for i in (0, 1)], 1)
        for path in (a, b)
    )
    return _mean(x - y)
