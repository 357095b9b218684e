"""LeRobot datasets of version 3: many episodes per parquet file and video."""

from __future__ import annotations

from pathlib import Path

from latentact.data.digest import Memo
from latentact.data.format import FORMATS, choose_camera
from latentact.data.lerobot.metadata import cameras, read_episode_table, read_info, read_tasks, task_list
from latentact.data.lerobot.source import LeRobotSource, Recording, lerobot_version
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
        camera = choose_camera(cameras(info.features), camera, path)
        video = info.features[camera].dtype == "video"
        files = sorted((path / "data").glob("*/*.parquet"))
        if info.total_episodes == 0:
            raise UserError(f"{path} must have at least one episode, got none. Finalize its recording.")
        if not files:
            raise UserError(
                f"{path} must have files data/*/*.parquet; copy the dataset again, or finalize its recording."
            )
        columns = read_episode_table(path, camera if video else "").to_pydict()
        order = list(dict.fromkeys(int(episode) for episode in columns["episode_index"]))
        if order != sorted(order):
            raise UserError(
                f"{path}: meta/episodes must be sorted by episode_index, because LeRobot looks episodes up "
                f"by position, got {order[:8]}; sort its rows."
            )
        texts = columns.get("tasks") or [()] * len(columns["episode_index"])
        recordings = []
        for row, episode in enumerate(columns["episode_index"]):
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
            recordings.append(Recording(int(episode), task_list(texts[row]), video_file, start))
        tables = Tables(path, info.features, files)
        tasks = read_tasks(path)
        source = LeRobotSource(path, camera, info, tables, recordings, tasks.texts, memo)
        source.notes += tasks.notes
        return source
