"""A LeRobot dataset of any version as a `Source`: tables, with videos beside them or images inside."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64, Shaped, UInt8

from latentact.data.decode.video import decode
from latentact.data.digest import Memo, blake2b, file_digest
from latentact.data.format import Episode
from latentact.data.lerobot.metadata import Info
from latentact.data.lerobot.tables import Tables, action_space, column_int
from latentact.data.time_base import clock_problem, image_times, nearest_frames
from latentact.errors import UserError
from latentact.io.records import read_text

logger = logging.getLogger(__name__)


class Recording(NamedTuple):
    """Where an episode's frames are."""

    episode: int
    """Its `episode_index`."""
    tasks: Sequence[str]
    """Task texts that the list of episodes names."""
    video: str = ""
    """Video file relative to the dataset; empty where images are in the table."""
    start: float = 0.0
    """Seconds into the video of the time 0 of its table: `from_timestamp`."""


def lerobot_version(path: Path) -> str:
    """Return the `codebase_version` of a LeRobot dataset; empty when `path` is none.

    Raises:
        UserError: `meta/info.json` is there and is not json.
    """
    file = path / "meta" / "info.json"
    if not file.is_file():
        return ""
    try:
        return str(json.loads(read_text(file)).get("codebase_version", ""))
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is not json ({error}); copy the dataset again.") from error


class LeRobotSource:
    """An opened LeRobot dataset.

    Args:
        path: its folder.
        camera: key of the camera.
        info: its metadata.
        tables: its parquet files.
        recordings: its episodes, in order.
        texts: task text of each task index.
        memo: remembers digests of videos and images.

    Raises:
        UserError: none of the episodes' files is there.
    """

    uneven = False
    resizable = True

    def __init__(
        self,
        path: Path,
        camera: str,
        info: Info,
        tables: Tables,
        recordings: Sequence[Recording],
        texts: Mapping[int, str],
        memo: Memo,
    ) -> None:
        """Scan what is there."""
        self.camera, self.fps, self.info = camera, float(info.fps), info
        self._path = path
        self.tables = tables
        """Its parquet files."""
        self.action_space, self.action_names = action_space(tables, path)
        self.skipped: dict[str, str] = {}
        if camera in tables.missing:
            raise UserError(
                f"{path} names the camera {camera!r}, which its tables lack; copy the dataset again."
            )
        self.notes = [f"column {name} is missing from the tables and left out" for name in tables.missing]
        recordings = list({r.episode: r for r in recordings}.values())  # one that is listed twice counts once
        present = [r for r in recordings if self._is_here(r)]
        self.absent = len(recordings) - len(present)
        """Episodes that are listed and not there."""
        if not present:
            raise UserError(
                f"{path} lists {len(recordings)} episodes and none of their files is there; copy them too."
            )
        if len(present) < len(recordings):
            self.notes.append(
                f"{len(recordings)} episodes are listed, of which {len(present)} are there: those are used"
            )
        self._set_tasks(present, texts)
        digests = tables.image_digests(camera, memo) if any(not r.video for r in present) else {}
        self.recordings: list[Recording] = []
        """Where the frames of each of `episodes` are."""
        self.episodes: list[Episode] = []
        self.unreadable: dict[str, str] = {}
        replaced: list[str] = []
        for recording in present:
            episode = self._describe(recording, digests, memo)
            timestamps = tables.timestamps(recording.episode)
            problem = clock_problem(timestamps) if recording.video else image_times(timestamps, self.fps)[1]
            if problem and recording.video:
                self.unreadable[episode.label] = problem
                continue
            if problem:
                replaced.append(f"{episode.name} ({problem})")
            self.recordings.append(recording)
            self.episodes.append(episode)
        if replaced:
            self.notes.append(
                f"{replaced[0]}{f' and {len(replaced) - 1} more' if len(replaced) > 1 else ''}: rows are "
                f"timed by their number and the rate, {self.fps:g} fps"
            )
        self.first_rows = [tables.spans[r.episode].first_row for r in self.recordings]

    def frames(self, number: int) -> Iterator[tuple[float, UInt8[np.ndarray, "h w 3"]]]:
        """Yield (seconds from the first row, frame), one for each row of the episode's table."""
        recording = self.recordings[number]
        times = self.times(number)
        if not recording.video:
            yield from zip(times.tolist(), self.tables.images(self.camera, recording.episode), strict=True)
            return
        lookup = recording.start + self.tables.timestamps(recording.episode)
        frame = 1 / self.fps
        video = decode(self._path / recording.video, lookup[0] - frame, lookup[-1] + frame)
        for time, (_, pixels) in zip(times.tolist(), nearest_frames(video, lookup, self.fps), strict=True):
            yield time, pixels

    def times(self, number: int) -> Float64[np.ndarray, " n"]:
        """Return the seconds of an episode's rows, from the first."""
        recording = self.recordings[number]
        timestamps = self.tables.timestamps(recording.episode)
        return timestamps - timestamps[:1] if recording.video else image_times(timestamps, self.fps)[0]

    def column(self, name: str) -> Shaped[np.ndarray, " rows *shape"] | None:
        """Return a numeric column of the tables, all rows."""
        return self.tables.column(name)

    def row_tasks(self, number: int) -> Int64[np.ndarray, " n"]:
        """Return which of `tasks` each row of an episode belongs to; -1: none."""
        return self._row_tasks[self.recordings[number].episode]

    def video_file(self, number: int) -> Path:
        """Return the video that holds an episode's frames."""
        return self._path / self.recordings[number].video

    def _set_tasks(self, recordings: Sequence[Recording], texts: Mapping[int, str]) -> None:
        """Find the task of each row: by `task_index`, or else the text that the list of episodes names."""
        index = column_int(self.tables, "task_index") if texts else None
        known = {text: n for n, text in enumerate(dict.fromkeys(text for text in texts.values() if text))}
        self._row_tasks: dict[int, np.ndarray] = {}
        for recording in recordings:
            span = self.tables.spans[recording.episode]
            rows = slice(span.first_row, span.first_row + span.end - span.begin)
            found = {} if index is None else {i: texts.get(int(i), "") for i in np.unique(index[rows])}
            if index is not None and all(found.values()):
                numbers = np.array([known[found[i]] for i in index[rows]])
            else:
                text = " / ".join(recording.tasks)
                numbers = np.full(rows.stop - rows.start, known.setdefault(text, len(known)) if text else -1)
            self._row_tasks[recording.episode] = numbers
        self.tasks = list(known)

    def _is_here(self, recording: Recording) -> bool:
        there = recording.episode in self.tables.spans
        return there and (not recording.video or (self._path / recording.video).is_file())

    def _describe(self, recording: Recording, digests: dict[int, str], memo: Memo) -> Episode:
        times = self.tables.timestamps(recording.episode)
        if recording.video:
            video = memo.get(self._path / recording.video, "file", file_digest)
            content = blake2b(video.encode(), np.float64(recording.start).tobytes(), times.tobytes())
        else:
            content = blake2b(digests[recording.episode].encode(), times.tobytes())
        span = self.tables.spans[recording.episode]
        used = dict.fromkeys(self._row_tasks[recording.episode].tolist())
        return Episode(
            name=f"episode {recording.episode}",
            file=recording.video or self.tables.files[span.file].relative_to(self._path).as_posix(),
            task=" / ".join(self.tasks[n] for n in used if n >= 0),
            frames=len(times),
            content=content,
        )
