"""Convert LeRobot datasets and folders of videos to LeRobot v3: collect the parts of each episode."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Shaped

from latentact.data.decode.video import decode
from latentact.data.format import Unreadable
from latentact.data.formats.video_folder import VideoFolderSource
from latentact.data.lerobot.convert import VIDEO_KEY, EpisodeData, write_episodes
from latentact.data.lerobot.metadata import BOOKKEEPING, Feature, read_episode_table
from latentact.data.lerobot.source import LeRobotSource, lerobot_version
from latentact.data.stream import FrameStream
from latentact.data.time_base import is_integer_rate
from latentact.errors import UserError


def convert(
    stream: FrameStream, out: Path, numbers: Sequence[int], remedy: str = "use --output file"
) -> list[int]:
    """Write episodes of a dataset as a LeRobot v3 dataset.

    Args:
        stream: a LeRobot v2 dataset or a folder of videos.
        out: folder to create.
        numbers: indices into `stream.source.episodes`, ascending.
        remedy: advice, for messages.

    Returns:
        The indices of the written episodes; episodes with missing video files are skipped.

    Raises:
        UserError: the format is not supported, the videos do not fit one LeRobot dataset, or one is damaged.
    """
    features, episodes = _collect(stream, numbers, remedy)
    _write(stream, out, features, list(episodes.values()), remedy)
    return list(episodes)


STATE = "observation.state"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive rows of an episode, with new columns."""

    number: int
    """Index into `stream.source.episodes`."""
    first: int
    """First row, counted in the episode."""
    columns: Mapping[str, Shaped[np.ndarray, "n size"]]
    """Name -> values of each row: float32, int64 or bool. One is `action`."""


def convert_with_actions(
    stream: FrameStream,
    out: Path,
    pieces: Sequence[Piece],
    *,
    remedy: str,
    state_size: int = 1,
    names: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write pieces of a dataset as the episodes of a LeRobot v3 dataset with new columns, actions among them.

    Columns of the data named `action...` are left out, since LeRobot would treat them as actions. Without a
    robot state every row gets a state of zeros, because LeRobot's policies require one.

    Args:
        stream: a LeRobot dataset or a folder of videos.
        out: folder to create.
        pieces: in the order of the new episodes.
        remedy: advice, for messages.
        state_size: size of the state of zeros for data without a state.
        names: column -> `names` of its feature.

    Raises:
        UserError: as in `convert`.
    """
    features, episodes = _collect(stream, sorted({piece.number for piece in pieces}), remedy)
    features = {name: feature for name, feature in features.items() if not name.startswith("action")}
    features.setdefault(STATE, {"dtype": "float32", "shape": (state_size,), "names": None})
    for name, values in pieces[0].columns.items():
        features[name] = {"dtype": str(values.dtype), "shape": values.shape[1:], "names": names.get(name)}
    written = []
    for piece in pieces:
        if piece.number in episodes:
            rows = slice(piece.first, piece.first + len(piece.columns["action"]))
            columns = _with_columns(episodes[piece.number].columns, piece, features)
            written.append(replace(episodes[piece.number], rows=rows, columns=columns))
    _write(stream, out, features, written, remedy)


def _with_columns(
    columns: Callable[[], dict[str, Any]], piece: Piece, features: Mapping[str, Any]
) -> Callable[[], dict[str, Any]]:
    """Return the columns of an episode with those of its piece in their rows."""

    def read() -> dict[str, Any]:
        new = {STATE: np.zeros((0, *features[STATE]["shape"]), np.float32), **piece.columns}
        end = piece.first + len(piece.columns["action"])
        for name, values in new.items():
            new[name] = np.zeros((end, *values.shape[1:]), values.dtype)
            new[name][end - len(values) :] = values
            if values.shape[1:] == (1,):  # LeRobot stores single numbers
                new[name] = new[name].reshape(-1)
        return {**new, **{k: v for k, v in columns().items() if k in features and k not in piece.columns}}

    return read


def _collect(
    stream: FrameStream, numbers: Sequence[int], remedy: str
) -> tuple[dict[str, Any], dict[int, EpisodeData]]:
    """Return the features, and the parts of each episode whose video files exist."""
    source, fps = stream.source, stream.fps
    if isinstance(source, LeRobotSource):
        kept = {k: f for k, f in source.tables.features.items() if k not in BOOKKEEPING and not f.depth}
        features = {k: _feature(f) for k, f in kept.items()}
        files = _video_files(stream.path, source)
        episodes = {number: _recorded(source, number, files(number)) for number in numbers}
        episodes = {n: e for n, e in episodes.items() if all(file.is_file() for file in e.videos.values())}
    elif isinstance(source, VideoFolderSource):
        episodes = {number: _plain(source, number, remedy) for number in numbers}
        features = {VIDEO_KEY: {"dtype": "video", "shape": (0, 0, 3), "names": None}}
    else:
        raise UserError(f"{stream.path} must be a LeRobot dataset or a folder of videos; {remedy}.")
    if not is_integer_rate(fps):
        raise UserError(
            f"{stream.path} must have an integer number of frames per second, as LeRobot datasets do, got "
            f"{fps:g}; {remedy}."
        )
    if not episodes:
        raise UserError(
            f"{stream.path} must have at least one episode with the videos of all cameras, got none; copy "
            f"the missing videos."
        )
    first = next(iter(episodes.values()))
    for key, file in first.videos.items():  # the size in the metadata may be wrong
        features[key] |= {"shape": next(decode(file))[1].shape, "names": ["height", "width", "channels"]}
    return features, episodes


def _write(
    stream: FrameStream, out: Path, features: dict[str, Any], episodes: list[EpisodeData], remedy: str
) -> None:
    robot = stream.source.info.robot_type if isinstance(stream.source, LeRobotSource) else None
    try:
        write_episodes(out, features, round(stream.fps), robot, episodes)
    except Unreadable as error:
        raise UserError(f"{error}; {remedy}, or replace it.") from error


def _feature(feature: Feature) -> dict[str, Any]:
    """Return a feature in LeRobot v3 format."""
    names = feature.names
    if feature.visual:
        names = ["height", "width", "channels"]
    elif isinstance(names, list) and len(names) == 1 and isinstance(names[0], list):
        names = names[0]
    shape = (*feature.hwc[:2], 3) if feature.visual else feature.shape or (1,)
    return {"dtype": feature.dtype, "shape": shape, "names": names}


def _video_files(path: Path, source: LeRobotSource) -> Callable[[int], dict[str, tuple[Path, float]]]:
    """Return a function from an episode to its cameras: video file, and its offset in seconds at time 0."""
    info = source.info
    cameras = [key for key, f in info.features.items() if f.dtype == "video" and not f.depth]
    tables = {}
    if lerobot_version(path).startswith("v3"):
        tables = {key: read_episode_table(path, key).to_pydict() for key in cameras}

    def find(number: int) -> dict[str, tuple[Path, float]]:
        episode = source.recordings[number].episode
        found = {}
        for key in cameras:
            if not tables:
                places, start = {"episode_chunk": episode // info.chunks_size, "episode_index": episode}, 0.0
            else:
                row = tables[key]["episode_index"].index(episode)
                names = ("chunk_index", "file_index")
                places = {name: int(tables[key][f"videos/{key}/{name}"][row]) for name in names}
                start = float(tables[key][f"videos/{key}/from_timestamp"][row])
            found[key] = path / info.file(path, "video_path", **places, video_key=key), start
        return found

    return find


def _recorded(source: LeRobotSource, number: int, videos: Mapping[str, tuple[Path, float]]) -> EpisodeData:
    """Return the files and columns of an episode of a LeRobot dataset."""
    episode, tables = source.recordings[number].episode, source.tables
    columns = [
        k for k, f in tables.features.items() if f.dtype != "video" and k not in BOOKKEEPING and not f.depth
    ]
    return EpisodeData(
        label=source.episodes[number].label,
        times=tables.timestamps(episode) if videos else source.times(number),
        tasks=["" if n < 0 else source.tasks[n] for n in source.row_tasks(number)],
        videos={key: file for key, (file, _) in videos.items()},
        starts={key: start for key, (_, start) in videos.items()},
        columns=lambda: {name: tables.episode_column(name, episode) for name in columns},
    )


def _plain(source: VideoFolderSource, number: int, remedy: str) -> EpisodeData:
    """Return a video of a folder as an episode."""
    file, episode = source.files[number], source.episodes[number]
    if file.suffix.lower() != ".mp4":
        raise UserError(f"{file} must be an mp4 file for a LeRobot dataset; {remedy}.")
    return EpisodeData(
        label=episode.name, times=None, tasks=[episode.task], videos={VIDEO_KEY: file}, columns=dict
    )
