"""Convert LeRobot v2 datasets and folders of videos to LeRobot v3: collect the parts of each episode."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentact.data.decode.video import decode
from latentact.data.format import Unreadable
from latentact.data.formats.video_folder import VideoFolderSource
from latentact.data.lerobot.convert import VIDEO_KEY, EpisodeData, write_episodes
from latentact.data.lerobot.metadata import BOOKKEEPING, Feature
from latentact.data.lerobot.source import LeRobotSource
from latentact.data.stream import FrameStream
from latentact.errors import UserError


def convert(stream: FrameStream, out: Path, numbers: Sequence[int]) -> list[int]:
    """Write episodes of a dataset as a LeRobot v3 dataset.

    Args:
        stream: a LeRobot v2 dataset or a folder of videos.
        out: folder to create.
        numbers: indices into `stream.source.episodes`, ascending.

    Returns:
        The indices of the written episodes; episodes with missing video files are skipped.

    Raises:
        UserError: the data has another format, its videos do not fit one LeRobot dataset, or one is damaged.
    """
    source, fps = stream.source, stream.fps
    if isinstance(source, LeRobotSource):
        kept = {k: f for k, f in source.tables.features.items() if k not in BOOKKEEPING and not f.depth}
        features = {k: _feature(f) for k, f in kept.items()}
        episodes = {number: _recorded(stream.path, source, number) for number in numbers}
        episodes = {n: e for n, e in episodes.items() if all(file.is_file() for file in e.videos.values())}
        robot = source.info.robot_type
    elif isinstance(source, VideoFolderSource):
        episodes, robot = {number: _plain(source, number) for number in numbers}, None
        features = {VIDEO_KEY: {"dtype": "video", "shape": (0, 0, 3), "names": None}}
    else:
        raise UserError(f"{stream.path} must be a LeRobot dataset or a folder of videos; use --output file.")
    if abs(fps - round(fps)) > 1e-3:
        raise UserError(
            f"{stream.path} must have an integer number of frames per second, as LeRobot datasets do, got "
            f"{fps:g}; use --output file."
        )
    if not episodes:
        raise UserError(
            f"{stream.path} must have at least one episode with the videos of all cameras, got none; copy "
            f"the missing videos."
        )
    first = next(iter(episodes.values()))
    for key, file in first.videos.items():  # the size in the metadata may be wrong
        features[key] |= {"shape": next(decode(file))[1].shape, "names": ["height", "width", "channels"]}
    try:
        write_episodes(out, features, round(fps), robot, list(episodes.values()))
    except Unreadable as error:
        raise UserError(f"{error}; use --output file, or replace it.") from error
    return list(episodes)


def _feature(feature: Feature) -> dict[str, Any]:
    """Return a feature in LeRobot v3 form."""
    names = feature.names
    if feature.visual:
        names = ["height", "width", "channels"]
    elif isinstance(names, list) and len(names) == 1 and isinstance(names[0], list):
        names = names[0]
    shape = (*feature.hwc[:2], 3) if feature.visual else feature.shape or (1,)
    return {"dtype": feature.dtype, "shape": shape, "names": names}


def _recorded(path: Path, source: LeRobotSource, number: int) -> EpisodeData:
    """Return the files and columns of an episode of a LeRobot v2 dataset."""
    episode, tables, info = source.recordings[number].episode, source.tables, source.info
    places = {"episode_chunk": episode // info.chunks_size, "episode_index": episode}
    videos = {
        key: path / info.file(path, "video_path", **places, video_key=key)
        for key, feature in info.features.items()
        if feature.dtype == "video" and not feature.depth
    }
    columns = [
        k for k, f in tables.features.items() if f.dtype != "video" and k not in BOOKKEEPING and not f.depth
    ]
    return EpisodeData(
        label=source.episodes[number].label,
        times=tables.timestamps(episode) if videos else source.times(number),
        tasks=["" if n < 0 else source.tasks[n] for n in source.row_tasks(number)],
        videos=videos,
        columns=lambda: {name: tables.episode_column(name, episode) for name in columns},
    )


def _plain(source: VideoFolderSource, number: int) -> EpisodeData:
    """Return a video of a folder as an episode."""
    file, episode = source.files[number], source.episodes[number]
    if file.suffix.lower() != ".mp4":
        raise UserError(f"{file} must be an mp4 file for a LeRobot dataset; use --output file.")
    return EpisodeData(
        label=episode.name, times=None, tasks=[episode.task], videos={VIDEO_KEY: file}, columns=dict
    )
