"""Does a policy follow its guide? Distances between a demonstration and its imitations, and a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from latentact.envs.episode import Episode
from latentact.evaluation.policy.intervals import mean_interval

CONDITIONS = ("matching", "wrong", "none")
"""Guides of a rollout: the demonstration's own, another demonstration's, and none."""


@dataclass(frozen=True, kw_only=True)
class EpisodeTrace:
    """The trajectory of one episode of t steps."""

    pixels: UInt8[np.ndarray, "t1 h w 3"]
    """The t + 1 frames."""
    agent: Float[np.ndarray, "t1 2"]
    """Position of the agent."""
    block: Float[np.ndarray, "t 2"] | None
    """Position of the block, if the environment reports it (``info["block_pose"]``)."""
    coverage: Float[np.ndarray, " t"] | None
    """Covered fraction of the goal, if the environment reports it (``info["coverage"]``)."""
    success: bool
    """Whether the task succeeded."""

    @classmethod
    def from_episode(cls, episode: Episode, frames: Sequence[np.ndarray]) -> EpisodeTrace:
        """Return the trajectory of an episode that recorded states and infos."""

        def reported(key: str) -> np.ndarray | None:
            infos = episode.infos
            return np.array([info[key] for info in infos]) if infos and key in infos[0] else None

        block = reported("block_pose")
        return cls(
            pixels=np.stack(frames),
            agent=np.stack(episode.states)[:, :2],
            block=None if block is None else block[:, :2],
            coverage=reported("coverage"),
            success=bool(episode.success),
        )


def compare_traces(demo: EpisodeTrace, played: EpisodeTrace) -> dict[str, Any]:
    """Return mean distances to the demonstration at the same timesteps, in the environment's units."""
    row: dict[str, Any] = {
        "agent": _mean_distance(demo.agent, played.agent),
        "success": played.success,
    }
    if demo.block is not None and played.block is not None:
        row["block"] = _mean_distance(demo.block, played.block)
    if played.coverage is not None:
        row |= {"coverage": float(played.coverage[-1]), "max_coverage": float(played.coverage.max())}
    return row


def _mean_distance(a: np.ndarray, b: np.ndarray) -> float:
    t = min(len(a), len(b))
    return float(np.linalg.norm(a[:t] - b[:t], axis=1).mean())


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return means with 95 % intervals over demonstrations, and a verdict in words.

    Args:
        rows: per demonstration, the result of `compare_traces` for each condition.
    """
    found: dict[str, Any] = {}
    for condition in (c for c in CONDITIONS if c in rows[0]):
        found[condition] = {
            name: {
                "mean": float(np.mean([row[condition][name] for row in rows])),
                "ci95": mean_interval([row[condition][name] for row in rows]),
            }
            for name in rows[0][condition]
        }
    own, other = found["matching"]["agent"], found["wrong"]["agent"]
    ratio = own["mean"] / max(other["mean"], 1e-9)
    distances = (
        f"{own['mean']:.3g} from the demonstration's path with its own guide, "
        f"{other['mean']:.3g} with another's"
    )
    if own["ci95"][1] >= other["ci95"][0]:
        verdict = f"The policy ignores its guide: the agent is {distances}, and the intervals overlap."
    elif ratio > 0.5:
        verdict = f"The guide steers the policy a little: the agent is {distances}."
    else:
        verdict = f"The policy follows its guide: the agent is {distances}."
    return {"conditions": found, "ratio": ratio, "verdict": verdict}
