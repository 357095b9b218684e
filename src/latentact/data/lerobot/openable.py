"""Problems that keep LeRobot from opening a dataset: `check-data` reports them and `precompute` rejects them.

The rules only read files and do not use LeRobot; `verify.py` opens written datasets with LeRobot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from latentact.data.decode.video import frame_times, video_properties
from latentact.data.format import Unreadable
from latentact.data.lerobot.metadata import BOOKKEEPING, cameras, read_episodes
from latentact.data.lerobot.recording import LeRobotFiles
from latentact.data.time_base import LEROBOT_TOLERANCE_S, lerobot_misses, row_times
from latentact.errors import UserError
from latentact.io.records import parquet_columns, parse_json, read_parquet, read_text

_SAMPLED = 32
"""Episodes whose images are read, spread over the data."""
_PLACE = ("chunk_index", "file_index")
_COUNTED = ("length", "dataset_from_index", "dataset_to_index")


def problems(source: LeRobotFiles) -> Iterator[str]:
    """Yield problems that keep LeRobot from opening a dataset or its conversion to version 3."""
    path = source.path
    yield from _feature_problems(source)
    yield from _value_problems(source)
    yield from _image_problems(source)
    if not source.info.codebase_version.startswith("v3"):
        yield from _old_time_problems(source)
        return
    for name in BOOKKEEPING:
        if name not in source.tables.features:
            yield f"meta/info.json and the tables must have the column {name}, which one of them lacks"
    for file in source.tables.empty:
        yield f"{file.relative_to(path)} must have rows, got none"
    yield from total_problems(source)
    yield from _episode_problems(source)
    yield from _task_problems(source)
    statistics = path / "meta/stats.json"
    if statistics.is_file():
        try:
            values = parse_json(read_text(statistics), "meta/stats.json")
            if not isinstance(values, dict) or not all(isinstance(each, dict) for each in values.values()):
                yield "meta/stats.json must hold an object of statistics for each feature"
        except UserError as error:
            yield str(error).rstrip(".").replace(str(statistics), "meta/stats.json")


def total_problems(source: LeRobotFiles) -> Iterator[str]:
    """Yield the totals of `meta/info.json` that contradict the tables; version 3 needs all of them."""
    needed = source.info.codebase_version.startswith("v3")
    counted = {"total_frames": source.tables.rows, "total_episodes": len(source.tables.spans)}
    for name, count in counted.items():
        named = getattr(source.info, name)
        if named != count and (needed or named is not None):
            yield f"meta/info.json: {name} must be {count} as in the tables, got {named}"
    if needed and not source.info.total_tasks:
        yield f"meta/info.json: total_tasks must be at least 1, got {source.info.total_tasks}"


def _feature_problems(source: LeRobotFiles) -> Iterator[str]:
    for name, feature in source.tables.features.items():
        if not feature.numeric:
            continue
        try:
            np.dtype(feature.dtype)
        except TypeError:
            yield f"meta/info.json: features.{name}.dtype must be a numeric type, got {feature.dtype!r}"


def _value_problems(source: LeRobotFiles) -> Iterator[str]:
    """Find missing values in columns whose type has no NaN; LeRobot cannot batch nulls."""
    rewritten = () if source.info.codebase_version.startswith("v3") else BOOKKEEPING
    for name, feature in source.tables.features.items():
        exact = not feature.dtype.startswith("float") and name not in rewritten
        column = source.tables.column(name) if exact else None
        if column is not None and column.dtype.kind == "f":
            row = int(np.argmax(np.isnan(column.reshape(len(column), -1)).any(1)))
            yield f"column {name} of {feature.dtype} must have a value in every row, got none in row {row}"


def _image_problems(source: LeRobotFiles) -> Iterator[str]:
    """Compare images with the shape that LeRobot expects: the first and last one of some episodes."""
    converted = not source.info.codebase_version.startswith("v3")
    for name in cameras(source.tables.features):
        feature = source.tables.features[name]
        if feature.dtype != "image":
            continue
        height, width, channels = feature.hwc
        expected = (height, width, 3 if converted else channels)
        for recording in source.recordings[:: max(1, len(source.recordings) // _SAMPLED)]:
            try:
                found = source.tables.image_shapes(name, recording.episode)
            except Unreadable:
                continue  # decoding reports it
            wrong = next((shape for shape in found if shape != expected), None)
            if wrong:
                yield (
                    f"camera {name}: images must be [h, w, c] = {list(expected)} as LeRobot reads them, got "
                    f"{list(wrong)} in episode {recording.episode}"
                )
                break


def _episode_problems(source: LeRobotFiles) -> Iterator[str]:
    """Compare `meta/episodes`, where LeRobot looks up episodes by row, with the tables."""
    path, info, spans = source.path, source.info, source.tables.spans
    videos = [key for key, feature in info.features.items() if feature.dtype == "video"]
    files = {key: [f"videos/{key}/{name}" for name in _PLACE] for key in videos}
    files["data"] = [f"data/{name}" for name in _PLACE]
    starts = [f"videos/{key}/from_timestamp" for key in videos]
    needed = ["episode_index", *_COUNTED, *(name for names in files.values() for name in names), *starts]
    where = "meta/episodes"
    for file in sorted((path / where).glob("*/*.parquet")):
        known = parquet_columns(file)
        if lacking := [name for name in needed if name not in known]:
            yield f"{where}: the column {lacking[0]} is missing"
            return
    try:
        table = read_episodes(path, needed)
    except UserError as error:
        yield str(error).rstrip(".")
        return
    for name in table.column_names:
        if name not in starts and not pa.types.is_integer(table[name].type):
            yield f"{where}: column {name} must hold integers, got {table[name].type}"
            return
    listed = table["episode_index"].to_pylist()
    if listed != list(range(len(listed))):
        row = next(n for n, episode in enumerate(listed) if episode != n)
        yield f"{where}: episode_index must be the row's number, got {listed[row]} in row {row}"
        return
    if unlisted := sorted(spans.keys() - set(listed)):
        yield f"{where} must list every episode of the tables, got no episode {unlisted[0]}"
    order = sorted(spans, key=lambda episode: spans[episode].begin)
    if order != sorted(order):
        yield f"data: rows must be in the order of episode_index, got episodes {str(order[:8])[1:-1]}"
    columns = table.to_pydict()
    for episode in listed:
        if episode not in spans:
            yield f"{where} lists episode {episode}, which has no rows in the tables"
            break
        span = spans[episode]
        rows = span.end - span.begin
        for name, count in zip(_COUNTED, (rows, span.begin, span.end), strict=True):
            if columns[name][episode] != count:
                yield (
                    f"{where}: {name} of episode {episode} must be {count} as in the tables, got "
                    f"{columns[name][episode]}"
                )
                return
    yield from _file_problems(source, {key: [columns[name] for name in files[key]] for key in files})
    for key in videos:
        by_file: dict[str, list[tuple[int, np.ndarray]]] = {}
        for episode, *place, start in zip(
            listed,
            *(columns[name] for name in files[key]),
            columns[f"videos/{key}/from_timestamp"],
            strict=True,
        ):
            if episode in spans:
                file = info.file(path, "video_path", **dict(zip(_PLACE, place, strict=True)), video_key=key)
                lookup = start + source.tables.timestamps(episode)
                by_file.setdefault(file, []).append((episode, lookup))
        yield from _time_problems(path, by_file)


def _old_time_problems(source: LeRobotFiles) -> Iterator[str]:
    """Find rows of version 2 data without a frame where LeRobot looks it up after conversion."""
    path, info, fps = source.path, source.info, source.fps
    for key in (k for k in cameras(info.features) if info.features[k].dtype == "video"):
        by_file = {}
        for recording in source.recordings:
            place = {"episode_chunk": recording.episode // info.chunks_size, "video_key": key}
            file = info.file(path, "video_path", **place, episode_index=recording.episode)
            lookup = source.tables.timestamps(recording.episode)
            by_file[file] = [(recording.episode, lookup[0] + row_times(lookup, fps))]
        yield from _time_problems(path, by_file)


def _time_problems(path: Path, by_file: Mapping[str, Sequence[tuple[int, np.ndarray]]]) -> Iterator[str]:
    """Find rows without a frame within LeRobot's tolerance, from the packets of the videos.

    Args:
        path: the dataset.
        by_file: video -> (episode, times of its rows in the video).
    """
    for file, lookups in by_file.items():
        try:
            shown = frame_times(path / file)
        except (Unreadable, OSError):
            continue  # decoding or `_file_problems` reports it
        for episode, times in lookups:
            rows = lerobot_misses(shown, times)
            if len(rows):
                yield (
                    f"{file}: rows must be within LeRobot's tolerance of {LEROBOT_TOLERANCE_S:g} s of their "
                    f"frames, got row {rows[0]} of episode {episode} at {times[rows[0]]:.6g} s"
                )
                return


def _file_problems(source: LeRobotFiles, files: dict[str, list[list[int]]]) -> Iterator[str]:
    """Check the files that `meta/episodes` names, and the size of the videos.

    Args:
        source: the opened dataset.
        files: camera key, or "data" -> chunk index and file index of each episode.
    """
    path, info = source.path, source.info
    for key, indices in files.items():
        template, camera = ("data_path", {}) if key == "data" else ("video_path", {"video_key": key})
        for place in sorted(set(zip(*indices, strict=True))):
            try:
                file = info.file(path, template, **dict(zip(_PLACE, place, strict=True)), **camera)
            except UserError as error:
                yield str(error).rstrip(".").replace(str(path / "meta/info.json"), "meta/info.json")
                break
            if not (path / file).is_file():
                yield f"meta/episodes lists the file {file}, which is missing"
                break
            if key == "data" or info.features[key].depth:
                continue
            try:
                video = video_properties(path / file)
            except Unreadable:
                continue  # decoding reports it
            shape, named = [video.height, video.width, 3], list(info.features[key].hwc)
            if shape != named:
                yield f"meta/info.json: features.{key}.shape must be {shape} as in {file}, got {named}"
                break


def _task_problems(source: LeRobotFiles) -> Iterator[str]:
    file = source.path / "meta/tasks.parquet"
    if not file.is_file():
        yield "meta/tasks.parquet is missing"
        return
    count, index = len(read_parquet(file)), source.tables.column("task_index")
    if index is None:
        return
    wrong = np.flatnonzero(~((-count <= index) & (index < count)))
    if len(wrong):
        yield (
            f"column task_index must be below {count}, the number of tasks in meta/tasks.parquet, got "
            f"{index[wrong[0]]:g} in row {wrong[0]}"
        )
