"""A folder of videos, nested as one likes, or a single video: each file is an episode.

An optional `metadata.csv` or `metadata.jsonl` in the folder has the columns `file_name` (relative to it) and
`task`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from jaxtyping import UInt8

from latentact.data.decode.video import SUFFIXES, decode, probe
from latentact.data.digest import Memo, file_digest
from latentact.data.format import FORMATS, Episode, Unreadable
from latentact.errors import UserError

_SAME_RATE = 0.01


@FORMATS.register("video_folder")
class VideoFolder:
    """Files that end in mp4, webm, mkv, mov, gif or avi; hidden files and folders are left out."""

    @staticmethod
    def detect(path: Path) -> bool:
        """Return whether `path` is a video file, or a folder with videos that is not a LeRobot dataset."""
        return not (path / "meta/info.json").exists() and any(videos(path))

    @staticmethod
    def open(path: Path, camera: str, memo: Memo) -> VideoFolderSource:
        """Return the readable videos, sorted by name.

        Raises:
            UserError: a camera is named, or the metadata is broken.
        """
        if camera:
            raise UserError(f"{path} is plain video, which has no camera {camera!r}; leave `camera` empty.")
        return VideoFolderSource(path, memo)


class VideoFolderSource:
    """The videos at a path.

    Args:
        path: folder or video file.
        memo: remembers digest, length and rate of each file.
    """

    camera = ""
    resizable = True
    action_space = None
    action_names = ()

    def __init__(self, path: Path, memo: Memo) -> None:
        """Look at every file."""
        root = path if path.is_dir() else path.parent
        tasks = _tasks(path) if path.is_dir() else {}
        self.unreadable: dict[str, str] = {}
        self.episodes: list[Episode] = []
        self.files: list[Path] = []
        rates = []
        for file in sorted(videos(path)):
            name = file.relative_to(root).as_posix()
            found = memo.get(file, "video", _look)
            if "error" in found:
                self.unreadable[name] = found["error"]
                continue
            rates.append(found["fps"])
            self.files.append(file)
            self.episodes.append(
                Episode(
                    name=name,
                    file=name,
                    task=tasks.get(name, ""),
                    frames=found["frames"],
                    content=found["digest"],
                )
            )
        known = [rate for rate in rates if rate]
        self.uneven = bool(known) and max(known) > (1 + _SAME_RATE) * min(known)
        self.fps = 1.0 if not known else min(known) if self.uneven else median(known)
        lengths = [episode.frames for episode in self.episodes]
        self.first_rows = (np.cumsum(lengths) - lengths).tolist() if lengths else []

    def frames(self, number: int) -> Iterator[tuple[float, UInt8[np.ndarray, "h w 3"]]]:
        """Yield (seconds from the first frame, frame) of a video."""
        origin = None
        for seconds, frame in decode(self.files[number]):
            origin = seconds if origin is None else origin
            yield seconds - origin, frame

    def column(self, name: str) -> None:
        """Return None: video has no numeric columns."""


def videos(path: Path) -> Iterator[Path]:
    """Yield the video files at or below a path, by their suffix."""
    candidates = path.rglob("*") if path.is_dir() else [path]
    for file in candidates:
        hidden = path.is_dir() and any(part.startswith(".") for part in file.relative_to(path).parts)
        if file.suffix.lower() in SUFFIXES and not hidden and file.is_file():
            yield file


def _look(file: Path) -> dict[str, Any]:
    try:
        info = probe(file)
    except Unreadable as error:
        return {"error": str(error)}
    return {"digest": file_digest(file), "frames": info.frames, "fps": info.fps}


def _tasks(folder: Path) -> dict[str, str]:
    """Return the task of each file name in the folder's metadata."""
    table, lines = folder / "metadata.csv", folder / "metadata.jsonl"
    try:
        if table.is_file():
            with table.open(newline="") as file:
                rows: list[dict[str, str]] = list(csv.DictReader(file))
        elif lines.is_file():
            rows = [json.loads(line) for line in lines.read_text().splitlines() if line.strip()]
        else:
            return {}
        return {row["file_name"]: row.get("task") or "" for row in rows}
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        wanted = "wanted the columns file_name and task"
        raise UserError(f"the metadata of {folder} cannot be read ({error!r}); {wanted}.") from error
