"""A folder of videos, nested to any depth, or a single video: each file is an episode.

An optional `metadata.csv` or `metadata.jsonl` in the folder has the columns `file_name` (relative to it) and
`task`.
"""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from statistics import median
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8

from latentact.data.decode.video import SUFFIXES, decode, probe
from latentact.data.digest import Memo, file_digest
from latentact.data.files import files_below, printable
from latentact.data.format import FORMATS, EpisodeMetadata, Source, Unreadable
from latentact.data.time_base import rates_agree
from latentact.errors import UserError
from latentact.io.records import Record, parse_json, parse_record, read_text

_METADATA = ("metadata.csv", "metadata.jsonl")


@FORMATS.register("video_folder")
class VideoFolder:
    """Files with a video suffix (`decode.video.SUFFIXES`); hidden files and folders are skipped."""

    @staticmethod
    def detect(path: Path) -> bool:
        """Return whether `path` is a video file, or a folder with videos that is not a LeRobot dataset."""
        return not (path / "meta/info.json").exists() and has_videos(path)

    @staticmethod
    def open(path: Path, camera: str, memo: Memo) -> VideoFolderSource:
        """Return the readable videos, sorted by name.

        Raises:
            UserError: a camera is given, or the metadata is invalid.
        """
        if camera:
            raise UserError(f"{path} has no camera {camera!r}: it is plain video; leave `camera` empty.")
        return VideoFolderSource(path, memo)


class VideoFolderSource(Source):
    """The videos at a path.

    Args:
        path: folder or video file.
        memo: cache of the digest, length and rate of each file.
    """

    camera = ""
    resizable = True
    action_space = None
    action_names = ()
    scene_cuts = True
    whole_videos = True

    def __init__(self, path: Path, memo: Memo) -> None:
        """Scan every file."""
        root = path if path.is_dir() else path.parent
        files, self.skipped = files_below(path, SUFFIXES)
        self.skipped = {name: why for name, why in self.skipped.items() if name.lower() not in _METADATA}
        self.kind = "video" if path.is_file() else "folder of videos"
        self.unreadable, self.episodes, self.notes = {}, [], []
        self.video_files = video_files = list[Path]()
        rates: list[float] = []
        metadata = _tasks(path) if path.is_dir() else None
        texts = metadata or {}
        uneven: dict[str, str] = {}
        for file in files:
            name = printable(file.relative_to(root))
            found = memo.get(file, "video.2", _scan)
            if "error" in found:
                self.unreadable[name] = found["error"]
                continue
            rates.append(found["fps"])
            if found["uneven"]:
                uneven[name] = f"{found['fps']:g} to {found['fastest']:g} fps"
            video_files.append(file)
            self.episodes.append(
                EpisodeMetadata(
                    name=name,
                    file=name,
                    task=texts.get(_key(name), ""),
                    frames=found["frames"],
                    content=found["digest"],
                )
            )
        known = [rate for rate in rates if rate]
        self.uneven = bool(uneven) or (bool(known) and not rates_agree(max(known), min(known)))
        self.fps = 1.0 if not known else min(known) if self.uneven else median(known)
        if uneven:
            first, rate = next(iter(uneven.items()))
            more = f" and {len(uneven) - 1} more" if len(uneven) > 1 else ""
            self.notes.append(f"{first}{more}: the frame rate varies ({rate})")
        if lost := [name for name in texts if name not in {_key(e.name) for e in self.episodes}]:
            self.notes.append(f"the metadata lists {len(lost)} files that are not read, such as {lost[0]}")
        if metadata is not None and not any(texts.values()):
            self.notes.append("the metadata has no task")
        lengths = [episode.frames for episode in self.episodes]
        self.first_rows = (np.cumsum(lengths) - lengths).tolist() if lengths else []
        self.tasks = sorted({episode.task for episode in self.episodes if episode.task})

    def frames(self, number: int) -> Iterator[tuple[float, UInt8[np.ndarray, "h w 3"]]]:
        """Yield (seconds from the first frame, frame) of a video."""
        origin = None
        for seconds, frame in decode(self.video_files[number]):
            origin = seconds if origin is None else origin
            yield seconds - origin, frame

    def column(self, name: str) -> None:
        """Return None: video has no numeric columns."""

    def row_tasks(self, number: int) -> Int64[np.ndarray, " n"]:
        """Return the index into `tasks` of each frame of a video; -1: no task."""
        episode = self.episodes[number]
        return np.full(episode.frames, self.tasks.index(episode.task) if episode.task else -1)


def has_videos(path: Path) -> bool:
    """Return whether a path is a video file, or a folder that contains one."""
    if path.is_dir():
        return bool(files_below(path, SUFFIXES)[0])
    return path.is_file() and path.suffix.lower() in SUFFIXES


def _scan(file: Path) -> dict[str, Any]:
    try:
        info = probe(file)
    except Unreadable as error:
        return {"error": str(error)}
    rate = {"fps": info.rate.fps, "fastest": info.rate.fastest, "uneven": info.rate.uneven}
    return {"digest": file_digest(file), "frames": info.frames, **rate}


class _TaskLine(Record):
    """One line of a folder's metadata."""

    file_name: str
    task: str | None = None


def _tasks(folder: Path) -> dict[str, str] | None:
    """Return the task of each file name in the folder's metadata; None if there is none.

    Raises:
        UserError: the metadata cannot be read, lacks the column file_name, or contradicts itself.
    """
    tables = [file for file in sorted(folder.iterdir()) if file.name.lower() in _METADATA]
    if not tables:
        return None
    if len(tables) > 1:
        raise UserError(
            f"{folder} must have one table of metadata, got {', '.join(t.name for t in tables)}; keep one."
        )
    table = tables[0]
    rows: list[tuple[int, Any]]
    if table.suffix.lower() == ".csv":
        rows = [*_csv(table)]
    else:
        numbered = enumerate(read_text(table).split("\n"), 1)
        rows = [(n, parse_json(line, f"{table}, line {n}")) for n, line in numbered if line.strip()]
    found: dict[str, str] = {}
    for number, row in rows:
        if isinstance(row, dict):
            _require_once(list(row), f"{table}, line {number}")
        fields = {str(k).strip().lower(): v for k, v in row.items()} if isinstance(row, dict) else row
        line = parse_record(_TaskLine, fields, f"{table}, line {number}")
        name = _key(PurePosixPath(line.file_name.strip().replace("\\", "/")).as_posix())
        task = (line.task or "").strip()
        if found.setdefault(name, task) != task:
            raise UserError(
                f"{table}, line {number}: {name} has two tasks, {found[name]!r} and {task!r}; keep one."
            )
    return found


def _key(name: str) -> str:
    """Return a file name in one of its Unicode forms; macOS decomposes accents and Excel does not."""
    return unicodedata.normalize("NFC", name)


def _require_once(names: list[str], where: str) -> None:
    """Check that no column that is read has two names, such as `task` and `Task`.

    Raises:
        UserError: one has.
    """
    for column in _TaskLine.model_fields:
        same = [name for name in names if str(name).strip().lower() == column]
        if len(same) > 1:
            raise UserError(f"{where} must have one column {column}, got {', '.join(same)}; keep one.")


def _csv(file: Path) -> list[tuple[int, dict[str, Any]]]:
    """Return the rows of a table with commas, semicolons or tabs between its columns, numbered by line."""
    text = read_text(file)
    if text.lower().startswith("sep="):  # how Excel names the separator
        text = text.partition("\n")[2]
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    rows = []
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        _require_once(list(reader.fieldnames or ()), str(file))
        names = reader.fieldnames
        if names and not any(name.strip().lower() == "file_name" for name in names):
            raise UserError(f"{file} must have the columns file_name and task, got {header.strip()!r}.")
        for row in reader:
            if any(cell.strip() for cell in row.pop(None, None) or ()):
                raise UserError(
                    f"{file}, line {reader.line_num} has more cells than the header; quote texts that "
                    f"contain {delimiter!r}."
                )
            if any(cell and cell.strip() for cell in row.values()):
                rows.append((reader.line_num, row))
    except csv.Error as error:
        raise UserError(
            f"{file} is not a table ({error}); it must have the columns file_name and task."
        ) from error
    return rows
