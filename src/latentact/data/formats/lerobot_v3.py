"""LeRobot datasets of version 3: many episodes per parquet file and per video."""

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
        """Return the dataset; videos are not touched yet.

        Raises:
            UserError: metadata is missing or broken, no episode is there, or the camera is unknown.
        """
        info = read_info(path)
        camera = choose_camera(cameras(info.features), camera, path)
        video = info.features[camera].dtype == "video"
        files = sorted((path / "data").glob("*/*.parquet"))
        if info.total_episodes == 0:
            raise UserError(f"{path} has no episodes; was its recording finalized?")
        if not files:
            raise UserError(
                f"{path} has no data/*/*.parquet; copy the dataset again, or finalize its recording."
            )
        columns = read_episode_table(path, camera if video else "").to_pydict()
        order = list(dict.fromkeys(int(episode) for episode in columns["episode_index"]))
        if order != sorted(order):
            raise UserError(
                f"{path}: meta/episodes must list episodes in the order of episode_index, by which LeRobot "
                f"finds them, got {order[:8]}; sort its rows."
            )
        tasks = columns.get("tasks") or [()] * len(columns["episode_index"])
        recordings = []
        for place, episode in enumerate(columns["episode_index"]):
            if not video:
                recordings.append(Recording(int(episode), task_list(tasks[place])))
                continue
            chunk, file, start = (
                columns[f"videos/{camera}/{name}"][place]
                for name in ("chunk_index", "file_index", "from_timestamp")
            )
            name = info.file(
                path, "video_path", video_key=camera, chunk_index=int(chunk), file_index=int(file)
            )
            recordings.append(Recording(int(episode), task_list(tasks[place]), name, float(start)))
        tables = Tables(path, info.features, files)
        return LeRobotSource(path, camera, info, tables, recordings, read_tasks(path), memo)
