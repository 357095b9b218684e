"""LeRobot datasets of versions 2.0 and 2.1, as they lie on disk: a parquet file and a video per episode."""

from __future__ import annotations

from pathlib import Path

from latentact.data.digest import Memo
from latentact.data.format import FORMATS, choose_camera
from latentact.data.lerobot.metadata import cameras, read_episode_lines, read_info, read_tasks
from latentact.data.lerobot.source import LeRobotSource, Recording, lerobot_version
from latentact.data.lerobot.tables import Tables


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
        info = read_info(path)
        camera = choose_camera(cameras(info.features), camera, path)
        video = info.features[camera].dtype == "video"
        recordings, files = [], []
        for line in read_episode_lines(path):
            places = {
                "episode_chunk": line.episode_index // info.chunks_size,
                "episode_index": line.episode_index,
            }
            files.append(path / info.file(path, "data_path", **places))
            name = info.file(path, "video_path", **places, video_key=camera) if video else ""
            recordings.append(Recording(line.episode_index, line.texts, name))
        tables = Tables(path, info.features, sorted(file for file in set(files) if file.is_file()))
        return LeRobotSource(path, camera, info, tables, recordings, read_tasks(path), memo)
