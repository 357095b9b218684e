"""LeRobot v2 datasets and folders of videos as LeRobot v3 datasets: rows, columns, videos of each episode."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentact.data.decode.video import decode
from latentact.data.format import Unreadable
from latentact.data.formats.video_folder import VideoFolderSource
from latentact.data.lerobot.convert import BOOKKEEPING, VIDEO_KEY, Take, write_takes
from latentact.data.lerobot.metadata import Feature
from latentact.data.lerobot.source import LeRobotSource
from latentact.data.stream import FrameStream
from latentact.errors import UserError


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
        kept = {k: f for k, f in source.tables.features.items() if k not in BOOKKEEPING and not f.depth}
        features = {k: _feature(f) for k, f in kept.items()}
        takes = {number: _recorded(stream.path, source, number) for number in numbers}
        takes = {n: take for n, take in takes.items() if all(file.is_file() for file in take.videos.values())}
        robot = source.info.robot_type
    elif isinstance(source, VideoFolderSource):
        takes, robot = {number: _plain(source, number) for number in numbers}, None
        features = {VIDEO_KEY: {"dtype": "video", "shape": (0, 0, 3), "names": None}}
    else:
        raise UserError(f"{stream.path} is no LeRobot dataset and no folder of videos; use --output file.")
    if abs(fps - round(fps)) > 1e-3:
        raise UserError(
            f"{stream.path} has {fps:g} frames per second, and LeRobot datasets have a whole number; "
            f"use --output file."
        )
    if not takes:
        raise UserError(
            f"{stream.path} has no episode of which every camera's video is there; copy them too."
        )
    first = next(iter(takes.values()))
    for key, file in first.videos.items():  # what metadata says of a video's size may be wrong
        features[key] |= {"shape": next(decode(file))[1].shape, "names": ["height", "width", "channels"]}
    try:
        write_takes(out, features, round(fps), robot, list(takes.values()))
    except Unreadable as error:
        raise UserError(f"{error}; use --output file, or replace it.") from error
    return list(takes)


def _feature(feature: Feature) -> dict[str, Any]:
    """Return a feature as v3 has it."""
    names = feature.names
    if feature.visual:
        names = ["height", "width", "channels"]
    elif isinstance(names, list) and len(names) == 1 and isinstance(names[0], list):
        names = names[0]
    shape = (*feature.hwc[:2], 3) if feature.visual else feature.shape or (1,)
    return {"dtype": feature.dtype, "shape": shape, "names": names}


def _recorded(path: Path, source: LeRobotSource, number: int) -> Take:
    """Return an episode of a LeRobot v2 dataset."""
    episode, tables, info = source.recordings[number].episode, source.tables, source.info
    places = {"episode_chunk": episode // info.chunks_size, "episode_index": episode}
    videos = {
        key: path / info.file(path, "video_path", **places, video_key=key)
        for key, feature in info.features.items()
        if feature.dtype == "video" and not feature.depth
    }
    rows = source.row_tasks(number)
    names = [
        k for k, f in tables.features.items() if f.dtype != "video" and k not in BOOKKEEPING and not f.depth
    ]
    return Take(
        label=source.episodes[number].label,
        times=tables.timestamps(episode) if videos else source.times(number),
        tasks=["" if n < 0 else source.tasks[n] for n in rows],
        videos=videos,
        columns=lambda: {name: tables.episode_column(name, episode) for name in names},
    )


def _plain(source: VideoFolderSource, number: int) -> Take:
    """Return a video as an episode."""
    file, episode = source.files[number], source.episodes[number]
    if file.suffix.lower() != ".mp4":
        raise UserError(f"{file} is no mp4, which LeRobot's videos are; use --output file.")
    return Take(label=episode.name, times=None, tasks=[episode.task], videos={VIDEO_KEY: file}, columns=dict)
