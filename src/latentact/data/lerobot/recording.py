"""The type of an opened LeRobot dataset, which its reader, checks and conversion share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from latentact.data.format import Source
from latentact.data.lerobot.metadata import Info
from latentact.data.lerobot.tables import Tables


class Recording(NamedTuple):
    """Location of the frames of an episode."""

    episode: int
    """`episode_index` of the episode."""
    tasks: Sequence[str]
    """Task texts from the list of episodes."""
    video: str = ""
    """Video file relative to the dataset; empty if images are in the table."""
    start: float = 0.0
    """Time in the video, in seconds, of timestamp 0 of the table (`from_timestamp`)."""


class LeRobotFiles(Source, Protocol):
    """A source with the files of a LeRobot dataset."""

    path: Path
    """Folder of the dataset."""
    info: Info
    """`meta/info.json`."""
    tables: Tables
    """Parquet files of the dataset."""
    recordings: list[Recording]
    """Location of the frames of each of `episodes`."""
    wrong_clocks: int
    """Number of unreadable episodes whose timestamps are not finite or do not ascend."""
