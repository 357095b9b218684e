"""The parts of a LeRobot dataset of any version, to write them as version 3."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentact.data.format import EpisodeData, LeRobotParts
from latentact.data.lerobot.metadata import BOOKKEEPING, Feature, read_episode_table
from latentact.data.lerobot.recording import LeRobotFiles


def lerobot_parts(source: LeRobotFiles) -> LeRobotParts:
    """Return features and episodes of an opened LeRobot dataset, without depth maps and index columns."""
    kept = {k: f for k, f in source.tables.features.items() if k not in BOOKKEEPING and not f.depth}
    videos = [key for key, f in source.info.features.items() if f.dtype == "video" and not f.depth]
    columns = [key for key, feature in kept.items() if feature.dtype != "video"]

    @functools.cache
    def table(key: str) -> Mapping[str, Any]:
        return read_episode_table(source.path, key).to_pydict()

    def video(key: str, episode: int) -> tuple[Path, float]:
        """Return the video file of an episode, and its offset in seconds at time 0."""
        if source.lerobot_version.startswith("v3"):
            row = table(key)["episode_index"].index(episode)
            names = ("chunk_index", "file_index")
            places = {name: int(table(key)[f"videos/{key}/{name}"][row]) for name in names}
            start = float(table(key)[f"videos/{key}/from_timestamp"][row])
        else:
            chunk = episode // source.info.chunks_size
            places, start = {"episode_chunk": chunk, "episode_index": episode}, 0.0
        return source.path / source.info.file(source.path, "video_path", **places, video_key=key), start

    def parts(number: int) -> EpisodeData:
        episode, tables = source.recordings[number].episode, source.tables
        files = {key: video(key, episode) for key in videos}
        return EpisodeData(
            label=source.episodes[number].label,
            times=tables.timestamps(episode) if files else source.times(number),
            tasks=["" if n < 0 else source.tasks[int(n)] for n in source.row_tasks(number)],
            videos={key: file for key, (file, _) in files.items()},
            starts={key: start for key, (_, start) in files.items()},
            columns=lambda: {name: tables.episode_column(name, episode) for name in columns},
        )

    return LeRobotParts(
        features={name: _feature(feature) for name, feature in kept.items()},
        episode=parts,
        robot_type=source.info.robot_type,
    )


def _feature(feature: Feature) -> dict[str, Any]:
    """Return a feature in LeRobot v3 format."""
    names = feature.names
    if feature.visual:
        names = ["height", "width", "channels"]
    elif isinstance(names, list) and len(names) == 1 and isinstance(names[0], list):
        names = names[0]
    shape = (*feature.hwc[:2], 3) if feature.visual else feature.shape or (1,)
    return {"dtype": feature.dtype, "shape": shape, "names": names}
