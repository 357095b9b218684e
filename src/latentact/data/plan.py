"""A plan of which episodes to label, as `latentact plan` writes it.

Episodes are identified by name and content, so that a plan also holds for a copy of the data, with other
actions or at another resolution.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Int64

from latentact.data.store import FrameStore
from latentact.errors import UserError
from latentact.io.records import Record, read_record


class PlannedEpisode(Record):
    """One episode to label."""

    name: str
    content: str


class PlanRecord(Record):
    """`plan.json`."""

    episodes: list[PlannedEpisode]
    """In the order in which to label them."""


def plan_entry(store: FrameStore, episode: int) -> dict[str, str]:
    """Return an episode as a plan names it."""
    return {"name": store.episode_ids[episode], "content": store.episode_contents[episode]}


def read_plan(file: str | Path, store: FrameStore) -> Int64[np.ndarray, " p"] | None:
    """Return the episodes of a plan as indices in this store, in its order; None without a file.

    Raises:
        UserError: the file is no plan, or the data lacks one of its episodes.
    """
    if not file:
        return None
    plan = read_record(PlanRecord, Path(file))
    known: dict[tuple[str, str], int] = {}
    for number, key in enumerate(zip(store.episode_ids, store.episode_contents, strict=True)):
        known.setdefault(key, number)
    found = [known.get((episode.name, episode.content)) for episode in plan.episodes]
    if None in found:
        lacking = plan.episodes[found.index(None)].name
        raise UserError(
            f"{file} must list episodes of {store.path}, got {lacking!r}, which it lacks or has with other "
            f"frames. Make the plan for this data."
        )
    return np.array(found, np.int64)
