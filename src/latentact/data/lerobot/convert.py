"""LeRobot v2 datasets and folders of videos as a LeRobot v3 dataset, without touching a video.

Each episode keeps its own video file, which v3 allows: it is hard-linked. lerobot's own converter wants every
episode that the metadata lists, and files of statistics; here what is there is taken, numbered anew, and its
statistics are computed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latentact.data.decode.stream import FrameStream
from latentact.data.decode.video import decode
from latentact.data.format import Unreadable
from latentact.data.formats.video_folder import VideoFolderSource
from latentact.data.lerobot.columns import link
from latentact.data.lerobot.source import LeRobotSource
from latentact.data.lerobot.tables import Span
from latentact.data.lerobot.writer import EPISODES_FILE, Table, number_statistics, pixel_statistics
from latentact.errors import UserError
from latentact.progress import Progress

VIDEO_KEY = "observation.images.video"
_BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")
_TOLERANCE_S = 1e-4  # lerobot's own, between the times of a table and of a video


@dataclass(frozen=True, kw_only=True)
class _Take:
    """One episode to write."""

    label: str
    """What messages call it."""
    length: int
    """Rows."""
    task: str
    videos: dict[str, Path]
    """Camera -> file that holds this episode and nothing else."""
    columns: Callable[[], dict[str, Any]]
    """Returns its numbers, texts and pictures."""


def convert(stream: FrameStream, out: Path, numbers: Sequence[int]) -> list[int]:
    """Write episodes of a dataset as a LeRobot v3 dataset; returns those whose files are all there.

    Args:
        stream: a LeRobot v2 dataset or a folder of videos.
        out: folder to create.
        numbers: places of the episodes in the data's list, ascending.

    Raises:
        UserError: the data is something else, its videos cannot be rows of one dataset, or one is damaged.
    """
    source, fps = stream.source, stream.fps
    if isinstance(source, LeRobotSource):
        info = json.loads((stream.path / "meta/info.json").read_text())
        features = {k: _feature(v) for k, v in info["features"].items() if k not in _BOOKKEEPING}
        takes = {number: _recorded(stream.path, info, source, number) for number in numbers}
        takes = {n: take for n, take in takes.items() if all(file.is_file() for file in take.videos.values())}
        robot = info.get("robot_type")
    elif isinstance(source, VideoFolderSource):
        takes, robot = {number: _plain(source, number) for number in numbers}, None
        height, width, _ = next(source.frames(numbers[0]))[1].shape
        features = {VIDEO_KEY: _feature({"dtype": "video", "shape": (height, width, 3)})}
    else:
        raise UserError(f"{stream.path} is no LeRobot dataset and no folder of videos; use --output file.")
    if abs(fps - round(fps)) > 1e-3:
        raise UserError(
            f"{stream.path} has {fps:g} frames per second, and LeRobot datasets a whole number; "
            f"use --output file."
        )
    if not takes:
        raise UserError(
            f"{stream.path} has no episode of which every camera's video is there; copy them too."
        )
    try:
        _write(out, features, round(fps), robot, list(takes.values()))
    except Unreadable as error:
        raise UserError(f"{error}; use --output file, or replace it.") from error
    return list(takes)


def _feature(feature: dict[str, Any]) -> dict[str, Any]:
    """Return a feature as v3 has it."""
    names = feature.get("names")
    if feature["dtype"] in ("video", "image"):
        names = ["height", "width", "channels"]
    elif isinstance(names, list) and len(names) == 1 and isinstance(names[0], list):
        names = names[0]
    return {"dtype": feature["dtype"], "shape": tuple(feature["shape"]), "names": names}


def _recorded(path: Path, info: dict[str, Any], source: LeRobotSource, number: int) -> _Take:
    """Return an episode of a LeRobot v2 dataset."""
    recording, tables = source.recordings[number], source.tables
    span = tables.spans[recording.episode]
    where = {"episode_chunk": recording.episode // info["chunks_size"], "episode_index": recording.episode}
    videos = {
        key: path / info["video_path"].format(**where, video_key=key)
        for key, feature in info["features"].items()
        if feature["dtype"] == "video"
    }
    return _Take(
        label=source.episodes[number].label,
        length=span.end - span.begin,
        task=recording.task,
        videos=videos,
        columns=lambda: _table(tables.files[span.file], info["features"], span),
    )


def _table(file: Path, features: dict[str, Any], span: Span) -> dict[str, Any]:
    import pyarrow.parquet as pq

    names = [k for k, v in features.items() if v["dtype"] != "video" and k not in _BOOKKEEPING]
    table = pq.ParquetFile(file).read(columns=[*names, "timestamp"]).slice(span.begin, span.end - span.begin)
    columns = {}
    for name in (*names, "timestamp"):
        values = table[name].to_pylist()
        plain = name in features and features[name]["dtype"] in ("image", "string", "language")
        columns[name] = values if plain else np.array(values)
    return columns


def _plain(source: VideoFolderSource, number: int) -> _Take:
    """Return a video as an episode."""
    file, episode = source.files[number], source.episodes[number]
    if file.suffix.lower() != ".mp4":
        raise UserError(f"{file} is no mp4, which LeRobot's videos are; use --output file.")
    times = np.arange(episode.frames) / source.fps
    return _Take(
        label=episode.name,
        length=episode.frames,
        task=episode.task,
        videos={VIDEO_KEY: file},
        columns=lambda: {"timestamp": times},
    )


def _write(root: Path, features: dict[str, Any], fps: int, robot: str | None, takes: list[_Take]) -> None:
    from datasets import Dataset
    from lerobot.datasets import io_utils
    from lerobot.datasets.compute_stats import aggregate_stats
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
    from lerobot.utils.utils import SuppressProgressBars, flatten_dict

    videos = any(feature["dtype"] == "video" for feature in features.values())
    meta: Any = LeRobotDatasetMetadata.create("local/dataset", fps, features, robot, root, use_videos=videos)
    rows, statistics, row = [], [], 0
    with Table(meta) as table, Progress("converting", len(takes), "episodes") as progress:
        for number, take in enumerate(takes):
            meta.save_episode_tasks([take.task])
            columns = _bookkeeping(meta, number, row, take)
            numbers = {k: v for k, v in columns.items() if isinstance(v, np.ndarray)}
            stats = number_statistics(numbers)
            place: dict[str, Any] = {}
            for key, file in take.videos.items():
                stats[key] = _video_statistics(file, take, features[key]["shape"], fps)
                place |= _link_video(meta, key, file, number, take.length / fps)
            stats |= {key: _image_statistics(columns[key]) for key in meta.image_keys}
            entry = {"episode_index": number, "tasks": [take.task], "length": take.length}
            entry |= {"dataset_from_index": row, "dataset_to_index": row + take.length}
            rows.append(
                {**entry, **table.append(columns), **place, **flatten_dict({"stats": stats}), **EPISODES_FILE}
            )
            statistics.append(stats)
            row += take.length
            progress.advance(1)
    for key in meta.video_keys:
        meta.update_video_info(key)
    info = meta.info
    info.total_episodes, info.total_frames, info.total_tasks = len(takes), row, len(meta.tasks)
    info.splits = {"train": f"0:{len(takes)}"}
    io_utils.write_info(info, root)
    io_utils.write_stats(dict(sorted(aggregate_stats(statistics).items())), root)
    with SuppressProgressBars():
        io_utils.write_episodes(Dataset.from_list(rows), root)


def _bookkeeping(meta: Any, number: int, first: int, take: _Take) -> dict[str, Any]:
    """Return an episode's columns, lerobot's own included."""
    moment = np.arange(take.length)
    return {
        **take.columns(),
        "timestamp": (moment / meta.fps).astype(np.float32),
        "frame_index": moment,
        "episode_index": np.full_like(moment, number),
        "index": first + moment,
        "task_index": np.full_like(moment, meta.get_task_index(take.task)),
    }


def _link_video(meta: Any, key: str, file: Path, number: int, seconds: float) -> dict[str, Any]:
    chunk, place = divmod(number, meta.chunks_size)
    link(file, meta.root / meta.video_path.format(video_key=key, chunk_index=chunk, file_index=place))
    values = {"chunk_index": chunk, "file_index": place, "from_timestamp": 0.0, "to_timestamp": seconds}
    return {f"videos/{key}/{name}": value for name, value in values.items()}


def _video_statistics(file: Path, take: _Take, shape: tuple[int, ...], fps: int) -> dict[str, np.ndarray]:
    """Return lerobot's statistics of a video from the frames that it would sample; checks their times too."""
    chosen, frames, count = set(_sampled(take.length)), [], 0
    for count, (seconds, frame) in enumerate(decode(file), 1):
        if count > take.length:
            break
        if abs(seconds - (count - 1) / fps) > _TOLERANCE_S or frame.shape != shape:
            raise Unreadable(
                f"{take.label}: frame {count - 1} of {file} is {frame.shape[1]}x{frame.shape[0]} at "
                f"{seconds:.4f} s, wanted {shape[1]}x{shape[0]} at {(count - 1) / fps:.4f} s"
            )
        if count - 1 in chosen:
            frames.append(_counts(frame))
    if count < take.length:
        raise Unreadable(f"{file} has {count} of the {take.length} frames of {take.label}")
    return pixel_statistics(np.sum(frames, axis=0), len(frames))


def _image_statistics(cells: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    counts = [_counts(picture) for picture in _pictures(cells)]
    return pixel_statistics(np.sum(counts, axis=0), len(counts))


def _pictures(cells: list[dict[str, Any]]) -> Iterator[np.ndarray]:
    import io

    from PIL import Image

    for place in _sampled(len(cells)):
        if cells[place]["bytes"] is None:
            raise Unreadable("pictures are not stored in the tables")
        with Image.open(io.BytesIO(cells[place]["bytes"])) as image:
            yield np.asarray(image.convert("RGB"))


def _sampled(length: int) -> list[int]:
    from lerobot.datasets.compute_stats import sample_indices

    return sample_indices(length)


def _counts(frame: np.ndarray) -> np.ndarray:
    """Return how often each value stands in each channel, `[3, 256]`."""
    return np.stack([np.bincount(frame[..., channel].ravel(), minlength=256) for channel in range(3)])
