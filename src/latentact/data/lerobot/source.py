"""A LeRobot dataset of any version as a `Source`; frames are in videos or in the tables."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int64, Shaped, UInt8

from latentact.data.decode.video import decode, frame_times
from latentact.data.digest import Memo, blake2b, file_digest
from latentact.data.format import EpisodeMetadata, FormatFindings, LeRobotParts, Unreadable
from latentact.data.lerobot.check import check_lerobot
from latentact.data.lerobot.metadata import Info
from latentact.data.lerobot.openable import problems
from latentact.data.lerobot.parts import lerobot_parts
from latentact.data.lerobot.recording import LeRobotFiles, Recording
from latentact.data.lerobot.tables import Tables, action_space, column_int
from latentact.data.time_base import clock_problem, image_times, lookup_span, nearest_frames, row_problem
from latentact.errors import UserError
from latentact.io.records import read_text

logger = logging.getLogger(__name__)

_SAMPLED = 8
"""Number of episodes whose images are looked at."""


def lerobot_version(path: Path) -> str:
    """Return the `codebase_version` of a LeRobot dataset; empty if `path` is not a LeRobot dataset.

    Raises:
        UserError: `meta/info.json` exists and is not JSON.
    """
    file = path / "meta" / "info.json"
    if not file.is_file():
        return ""
    try:
        return str(json.loads(read_text(file)).get("codebase_version", ""))
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} must be JSON ({error}); copy the dataset again.") from error


class LeRobotSource(LeRobotFiles):
    """An opened LeRobot dataset.

    Args:
        path: folder of the dataset.
        camera: key of the camera.
        info: metadata.
        tables: parquet files.
        recordings: locations of the episodes, in order.
        texts: task index -> task text.
        memo: memoizes digests of videos and images.

    Raises:
        UserError: the files of all listed episodes are missing.
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
        """Scan the dataset."""
        self.camera, self.fps, self.info, self.path = camera, float(info.fps), info, path
        self.lerobot_version = info.codebase_version
        self.kind = f"LeRobot {info.codebase_version}"
        self.tables = tables
        self.action_space, self.action_names = action_space(tables, path)
        self.numeric_columns = [name for name, feature in tables.features.items() if feature.numeric]
        self.skipped = {}
        if camera in tables.missing:
            raise UserError(
                f"{path} must have a column for the camera {camera!r} in its tables; copy the dataset again."
            )
        self.notes = [f"column {name} is missing from the tables and is ignored" for name in tables.missing]
        self.notes += [f"column {name} is not in meta/info.json and is ignored" for name in tables.unlisted]
        recordings = list({r.episode: r for r in recordings}.values())  # drop duplicates
        missing = {r.episode: found for r in recordings if (found := self._missing(r))}
        present = [r for r in recordings if r.episode not in missing]
        first = next(iter(missing.values()), "")
        self.missing_episodes = len(recordings) - len(present)
        if not present:
            raise UserError(
                f"{path} lists {len(recordings)} episodes but has the files of none"
                f"{first and f', such as {first}'}; copy the missing files."
            )
        if len(present) < len(recordings):
            self.notes.append(
                f"{len(recordings)} episodes are listed; using the {len(present)} whose files are present, "
                f"as there is no {first}"
            )
        if unlisted := sorted(tables.spans.keys() - {r.episode for r in recordings}):
            self.notes.append(
                f"rows of {len(unlisted)} episodes, such as episode {unlisted[0]}, are in the tables but not "
                f"in the list of episodes: they are left out"
            )
        self._set_tasks(present, texts)
        self._set_episodes(present, memo)
        self.first_rows = [tables.spans[r.episode].begin for r in self.recordings]
        videos = dict.fromkeys(recording.video for recording in self.recordings if recording.video)
        self.video_files = [path / video for video in videos]

    def _set_episodes(self, recordings: Sequence[Recording], memo: Memo) -> None:
        """Set the readable episodes, and the reasons why others are not readable."""
        images = any(not r.video for r in recordings)
        digests = self.tables.image_digests(self.camera, memo) if images else {}
        self.recordings = []
        self.episodes = []
        self.unreadable = {}
        self.wrong_clocks = 0
        lost = self._lost(recordings, memo)
        replaced: list[str] = []
        for recording in recordings:
            episode = self._describe(recording, digests, memo)
            timestamps = self.tables.timestamps(recording.episode)
            problem = lost.get(recording.episode, "")
            if not problem and not recording.video:
                problem = image_times(timestamps, self.fps)[1]
            if problem and recording.video:
                self.unreadable[episode.label] = problem
                continue
            if problem:
                replaced.append(f"{episode.name} ({problem})")
            self.recordings.append(recording)
            self.episodes.append(episode)
        if replaced:
            self.notes.append(
                f"{replaced[0]}{f' and {len(replaced) - 1} more' if len(replaced) > 1 else ''}: using "
                f"row / fps as timestamps, with {self.fps:g} fps"
            )

    def frames(self, number: int) -> Iterator[tuple[float, UInt8[np.ndarray, "h w 3"]]]:
        """Yield (seconds since the first row, frame) for each row of an episode."""
        recording = self.recordings[number]
        times = self.times(number)
        if not recording.video:
            yield from zip(times.tolist(), self.tables.images(self.camera, recording.episode), strict=True)
            return
        video_times = recording.start + self.tables.timestamps(recording.episode)
        video = decode(self.path / recording.video, *lookup_span(video_times, self.fps))
        frames = nearest_frames(video, video_times, self.fps)
        for seconds, (_, frame) in zip(times.tolist(), frames, strict=True):
            yield seconds, frame

    def times(self, number: int) -> Float64[np.ndarray, " n"]:
        """Return the time of each row of an episode, in seconds since its first row."""
        recording = self.recordings[number]
        timestamps = self.tables.timestamps(recording.episode)
        return timestamps - timestamps[:1] if recording.video else image_times(timestamps, self.fps)[0]

    def column(self, name: str) -> Shaped[np.ndarray, " rows *shape"] | None:
        """Return a numeric column for all rows of the tables; None if it does not exist."""
        return self.tables.column(name)

    def row_tasks(self, number: int) -> Int64[np.ndarray, " n"]:
        """Return the index into `tasks` of each row of an episode; -1: no task."""
        return self._row_tasks[self.recordings[number].episode]

    def image_modes(self) -> Sequence[str]:
        """Return Pillow's modes of the first images of some episodes."""
        modes = set()
        for recording in self.recordings[:: max(1, len(self.recordings) // _SAMPLED)]:
            with suppress(Unreadable):  # decoding reports it
                modes.add(self.tables.image_mode(self.camera, recording.episode))
        return sorted(modes)

    def table_rows(self) -> tuple[Int64[np.ndarray, " rows"], Int64[np.ndarray, " rows"]]:
        """Return `episode_index` and `frame_index` of each row of the tables."""
        lengths = {episode: span.end - span.begin for episode, span in self.tables.spans.items()}
        frame = self.column("frame_index")
        if frame is None:
            frame = np.concatenate([np.arange(length) for length in lengths.values()])
        return np.repeat([*lengths], [*lengths.values()]), frame

    def findings(self) -> FormatFindings:
        """Return what `check-data` reports about LeRobot datasets."""
        return check_lerobot(self)

    def lerobot_problems(self) -> Iterable[str]:
        """Return what keeps LeRobot from opening this data, or its conversion to version 3."""
        return problems(self)

    def lerobot_parts(self) -> LeRobotParts:
        """Return the parts of a LeRobot dataset of version 3."""
        return lerobot_parts(self)

    def _set_tasks(self, recordings: Sequence[Recording], texts: Mapping[int, str]) -> None:
        """Set the task of each row from `task_index`, or else from the list of episodes."""
        index = column_int(self.tables, "task_index") if texts else None
        known = {text: n for n, text in enumerate(dict.fromkeys(text for text in texts.values() if text))}
        self._row_tasks: dict[int, np.ndarray] = {}
        unnamed: list[int] = []
        for recording in recordings:
            span = self.tables.spans[recording.episode]
            rows = slice(span.begin, span.end)
            used = {} if index is None else {i: texts.get(int(i)) for i in np.unique(index[rows])}
            if index is not None and None not in used.values():
                numbers = np.array([known.get(used[i] or "", -1) for i in index[rows]])
            else:
                unnamed += [i for i, text in used.items() if text is None]
                text = " / ".join(recording.tasks)
                numbers = np.full(rows.stop - rows.start, known.setdefault(text, len(known)) if text else -1)
            self._row_tasks[recording.episode] = numbers
        self.tasks = list(known)
        if unnamed:
            self.notes.append(
                f"column task_index: {unnamed[0]} is not in the table of tasks; its episodes have the tasks "
                f"of the list of episodes"
            )

    def _lost(self, recordings: Sequence[Recording], memo: Memo) -> dict[int, str]:
        """Return the episodes in which a row has no valid time or no frame of its own, with the reason."""
        found: dict[int, str] = {}
        by_video: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
        for recording in (r for r in recordings if r.video):
            timestamps = self.tables.timestamps(recording.episode)
            if problem := clock_problem(timestamps):
                found[recording.episode] = problem
                self.wrong_clocks += 1
            else:
                by_video[recording.video][str(recording.episode)] = recording.start + timestamps
        for video, lookups in by_video.items():

            def find(file: Path, lookups: dict[str, np.ndarray] = lookups) -> dict[str, str]:
                try:
                    shown = frame_times(file)
                except Unreadable:
                    return {}  # decoding reports it
                problems = {name: row_problem(shown, times, self.fps) for name, times in lookups.items()}
                return {name: problem for name, problem in problems.items() if problem}

            key = blake2b(repr([self.fps, *lookups]).encode(), *(t.tobytes() for t in lookups.values()))
            wrong = memo.get(self.path / video, f"rows.1:{key}", find)
            found |= {int(name): problem for name, problem in wrong.items()}
        return found

    def _missing(self, recording: Recording) -> str:
        """Return the part of an episode that does not exist: its video, or the rows of its table."""
        if recording.video and not (self.path / recording.video).is_file():
            return recording.video
        return "" if recording.episode in self.tables.spans else f"row of episode {recording.episode}"

    def _describe(self, recording: Recording, digests: dict[int, str], memo: Memo) -> EpisodeMetadata:
        """Return name, file, tasks, length and content digest of an episode."""
        times = self.tables.timestamps(recording.episode)
        if recording.video:
            video = memo.get(self.path / recording.video, "file", file_digest)
            content = blake2b(video.encode(), np.float64(recording.start).tobytes(), times.tobytes())
        else:
            content = blake2b(digests[recording.episode].encode(), times.tobytes())
        span = self.tables.spans[recording.episode]
        tasks = dict.fromkeys(self._row_tasks[recording.episode].tolist())
        return EpisodeMetadata(
            name=f"episode {recording.episode}",
            file=recording.video or self.tables.file(span).relative_to(self.path).as_posix(),
            task=" / ".join(self.tasks[int(n)] for n in tasks if n >= 0),
            frames=len(times),
            content=content,
        )
