"""LeRobot datasets of version 3: many episodes per parquet file and per video; lerobot reads the metadata."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from latentact.data.digest import Memo
from latentact.data.format import FORMATS, choose_camera
from latentact.data.lerobot.source import LeRobotSource, Recording, lerobot_version
from latentact.data.lerobot.tables import Tables, cameras
from latentact.errors import UserError, missing_extra


@FORMATS.register("lerobot_v3")
class LeRobotV3:
    """A folder with `meta/info.json` whose `codebase_version` is v3.x."""

    @staticmethod
    def detect(path: Path) -> bool:
        """Return whether `path` is a LeRobot dataset of version 3."""
        return lerobot_version(path).startswith("v3")

    @staticmethod
    def open(path: Path, camera: str, memo: Memo) -> LeRobotSource:
        """Return the dataset; videos are not touched yet.

        Raises:
            UserError: files that `info.json` announces are missing, or the camera is unknown.
        """
        meta = _metadata(path)
        features: dict[str, Any] = meta.info.features
        camera = choose_camera(cameras(features), camera, path)
        tables = Tables(features, sorted((path / "data").glob("*/*.parquet")))
        columns = ["episode_index", "tasks"]
        video = features[camera]["dtype"] == "video"
        keys = [
            f"videos/{camera}/{name}"
            for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
        ]
        rows = meta.episodes.select_columns(columns + (keys if video else []))[:]
        recordings = []
        for place, episode in enumerate(rows["episode_index"]):
            if video:
                chunk, file, start, stop = (rows[key][place] for key in keys)
                name = meta.info.video_path.format(video_key=camera, chunk_index=chunk, file_index=file)
                recordings.append(Recording(episode, " / ".join(rows["tasks"][place]), name, start, stop))
            else:
                recordings.append(Recording(episode, " / ".join(rows["tasks"][place])))
        return LeRobotSource(path, camera, float(meta.info.fps), tables, recordings, memo)


def _metadata(path: Path) -> Any:
    """Return lerobot's metadata of a local dataset; what it would otherwise download is checked first."""
    info = json.loads((path / "meta/info.json").read_text())
    if not info.get("total_episodes"):
        raise UserError(f"{path} has no episodes; was its recording finalized?")
    for pattern in ("meta/tasks.parquet", "meta/episodes/*/*.parquet", "data/*/*.parquet"):
        if not any(path.glob(pattern)):
            raise UserError(f"{path} has no {pattern}; copy the dataset again, or finalize its recording.")
    try:
        from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
    except ModuleNotFoundError as error:
        raise missing_extra("lerobot", "lerobot") from error
    logging.getLogger(__name__).debug("reading the metadata of %s", path)
    return LeRobotDatasetMetadata(path.name, root=path)
