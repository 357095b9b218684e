"""LeRobot datasets of versions 2.0 and 2.1: one parquet file and one video per episode."""

from __future__ import annotations

from pathlib import Path

from latentact.data.digest import Memo
from latentact.data.format import FORMATS
from latentact.data.lerobot.metadata import choose_lerobot_camera, read_episode_lines, read_info, read_tasks
from latentact.data.lerobot.recording import Recording
from latentact.data.lerobot.source import LeRobotSource, lerobot_version
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
        """Open the dataset with the listed episodes whose files are present.

        Raises:
            UserError: metadata is missing or invalid, no episode is present, or the camera is unknown.
        """
        info = read_info(path)
        camera = choose_lerobot_camera(info.features, camera, path)
        video = info.features[camera].dtype == "video"
        recordings, files = [], []
        lines = read_episode_lines(path)
        for line in lines:
            location = {
                "episode_chunk": line.episode_index // info.chunks_size,
                "episode_index": line.episode_index,
            }
            files.append(path / info.file(path, "data_path", **location))
            video_file = info.file(path, "video_path", **location, video_key=camera) if video else ""
            recordings.append(Recording(line.episode_index, line.texts, video_file))
        tables = Tables(path, info.features, sorted(file for file in set(files) if file.is_file()))
        source = LeRobotSource(path, camera, info, tables, recordings, read_tasks(path).texts, memo)
        for line in lines:
            span = tables.spans.get(line.episode_index)
            if span and line.length is not None and line.length != span.end - span.begin:
                source.notes.append(
                    f"meta/episodes.jsonl: length of episode {line.episode_index} must be "
                    f"{span.end - span.begin} as in its table, got {line.length}; the table's rows are used"
                )
                break
        return source
