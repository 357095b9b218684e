"""LeRobot datasets of version 3: many episodes per parquet file and video."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentact.data.digest import Memo
from latentact.data.format import FORMATS
from latentact.data.lerobot.metadata import (
    choose_lerobot_camera,
    read_episode_table,
    read_info,
    read_tasks,
    task_list,
)
from latentact.data.lerobot.recording import Recording
from latentact.data.lerobot.source import LeRobotSource, lerobot_version
from latentact.data.lerobot.tables import Tables
from latentact.errors import UserError


@FORMATS.register("lerobot_v3")
class LeRobotV3:
    """A folder with `meta/info.json` whose `codebase_version` is v3.x."""

    @staticmethod
    def detect(path: Path) -> bool:
        """Return whether `path` is a LeRobot dataset of version 3."""
        return lerobot_version(path).startswith("v3")

    @staticmethod
    def open(path: Path, camera: str, memo: Memo) -> LeRobotSource:
        """Open the dataset without reading its videos.

        Raises:
            UserError: metadata is missing or invalid, no episode is present, or the camera is unknown.
        """
        info = read_info(path)
        camera = choose_lerobot_camera(info.features, camera, path)
        video = info.features[camera].dtype == "video"
        files = sorted((path / "data").glob("*/*.parquet"))
        if info.total_episodes == 0:
            raise UserError(f"{path} must have at least one episode, got none. Finalize its recording.")
        if not files:
            raise UserError(
                f"{path} must have files data/*/*.parquet; copy the dataset again, or finalize its recording."
            )
        columns = read_episode_table(path, camera if video else "").to_pydict()
        listed = [int(episode) for episode in columns["episode_index"]]
        order = list(dict.fromkeys(listed))
        rows = {episode: row for row, episode in reversed([*enumerate(listed)])}
        if order != sorted(order) or any(row > episode for episode, row in rows.items()):
            raise UserError(
                f"{path}: meta/episodes must be sorted by episode_index, each once, because LeRobot looks "
                f"episodes up by position, got {listed[:8]}; sort its rows."
            )
        texts = columns.get("tasks") or [()] * len(columns["episode_index"])
        recordings = []
        for episode in order:
            row = rows[episode]
            video_file, start = "", 0.0
            if video:
                video_file = info.file(
                    path,
                    "video_path",
                    video_key=camera,
                    chunk_index=int(columns[f"videos/{camera}/chunk_index"][row]),
                    file_index=int(columns[f"videos/{camera}/file_index"][row]),
                )
                start = float(columns[f"videos/{camera}/from_timestamp"][row])
            recordings.append(Recording(episode, task_list(texts[row]), video_file, start))
        tables = Tables(path, info.features, files)
        tasks = read_tasks(path)
        source = LeRobotSource(path, camera, info, tables, recordings, tasks.texts, memo)
        source.notes += tasks.notes
        if video and (ends := columns.get(f"videos/{camera}/to_timestamp")):
            source.notes += _contradictions(source, {episode: ends[row] for episode, row in rows.items()})
        return source


def _contradictions(source: LeRobotSource, ends: Mapping[int, Any]) -> list[str]:
    """Return notes about parts of videos that share frames or are no part; LeRobot shows them as they are.

    Args:
        source: the dataset.
        ends: `to_timestamp` of each episode.
    """
    shared, wrong, frame = [], [], 1 / source.fps
    last = defaultdict[str, tuple[float, int]](lambda: (-math.inf, -1))
    spans = [(r, r.start + source.tables.timestamps(r.episode)[[0, -1]]) for r in source.recordings]
    for recording, (begin, end) in sorted(spans, key=lambda each: each[1][0]):
        video, episode, named = recording.video, recording.episode, ends[recording.episode]
        if begin < last[video][0] + frame / 2:
            shared.append(f"episodes {last[video][1]} and {episode} share frames of {video}")
        last[video] = max(last[video], (end, episode))
        if not isinstance(named, int | float) or not abs(named - end - frame) < frame / 2:
            wrong.append(
                f"to_timestamp of episode {episode} must be {end + frame:.6g} s, where its rows end, got "
                f"{named}"
            )
    return [
        f"meta/episodes: {found[0]}{f' and {len(found) - 1} more' if len(found) > 1 else ''}; LeRobot shows "
        f"these frames, and cuts the video wrongly"
        for found in (shared, wrong)
        if found
    ]
