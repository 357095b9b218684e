"""LeRobot datasets of versions 2.0 and 2.1, as they lie on disk: a parquet file and a video per episode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from latentact.data.digest import Memo
from latentact.data.format import FORMATS, choose_camera
from latentact.data.lerobot.source import LeRobotSource, Recording, lerobot_version
from latentact.data.lerobot.tables import Tables, cameras
from latentact.errors import UserError


@FORMATS.register("lerobot_v2")
class LeRobotV2:
    """A folder with `meta/info.json` whose `codebase_version` is v2.x."""

    @staticmethod
    def detect(path: Path) -> bool:
        """Return whether `path` is a LeRobot dataset of version 2."""
        return lerobot_version(path).startswith("v2")

    @staticmethod
    def open(path: Path, camera: str, memo: Memo) -> LeRobotSource:
        """Return the dataset: those of the listed episodes whose files are there.

        Raises:
            UserError: metadata is missing or broken, no episode is there, or the camera is unknown.
        """
        info = json.loads((path / "meta/info.json").read_text())
        try:
            features, fps, size = info["features"], float(info["fps"]), int(info["chunks_size"])
            table_path, video_path = info["data_path"], info.get("video_path")
        except KeyError as error:
            raise UserError(f"{path / 'meta/info.json'} has no {error}; copy the dataset again.") from error
        camera = choose_camera(cameras(features), camera, path)
        video = features[camera]["dtype"] == "video"
        recordings, files = [], []
        for row in _lines(path / "meta/episodes.jsonl"):
            episode = int(row["episode_index"])
            names = {"episode_chunk": episode // size, "episode_index": episode}
            files.append(path / table_path.format(**names))
            name = video_path.format(**names, video_key=camera) if video else ""
            recordings.append(Recording(episode, " / ".join(row.get("tasks", ())), name))
        tables = Tables(features, sorted(file for file in files if file.is_file()))
        return LeRobotSource(path, camera, fps, tables, recordings, memo)


def _lines(file: Path) -> list[dict[str, Any]]:
    """Return the objects of a json lines file of LeRobot metadata."""
    try:
        rows = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); copy the dataset again.") from error
    if not all(isinstance(row, dict) and "episode_index" in row for row in rows):
        raise UserError(f"{file} has lines without an episode_index; copy the dataset again.")
    return rows
