"""Convert data to LeRobot v3, such as LeRobot v2 datasets and folders of videos."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Shaped

from latentact.data.decode.video import decode, video_properties
from latentact.data.format import EpisodeData, LeRobotParts, Unreadable
from latentact.data.lerobot.convert import write_episodes
from latentact.data.stream import FrameStream
from latentact.data.time_base import is_integer_rate
from latentact.errors import UserError


def convert(
    stream: FrameStream, out: Path, numbers: Sequence[int], remedy: str = "use --output file"
) -> list[int]:
    """Write episodes of a dataset as a LeRobot v3 dataset.

    Args:
        stream: data whose source has `lerobot_parts`.
        out: folder to create.
        numbers: indices into `stream.source.episodes`, ascending.
        remedy: advice, for messages.

    Returns:
        The indices of the written episodes; episodes with missing video files are skipped.

    Raises:
        UserError: the format is not supported, the videos do not fit one LeRobot dataset, or one is damaged.
    """
    parts, episodes = _collect(stream, numbers, remedy)
    _write(out, parts.features, stream.fps, parts.robot_type, list(episodes.values()), remedy)
    return list(episodes)


def check_convertible(stream: FrameStream, remedy: str) -> None:
    """Check what headers and first frames tell, before anything is encoded.

    Raises:
        UserError: as in `convert`; videos of a camera differ in size.
    """
    sizes: dict[str, tuple[int, int]] = {}
    for episode in _episodes(stream, range(len(stream.source.episodes)), remedy)[1].values():
        for key, file in episode.videos.items():
            try:
                video = video_properties(file)
            except Unreadable:  # it is left out, or refused by name
                continue
            size = video.width, video.height
            if video.orientation == (1, 0, 0, 1) and size != (first := sizes.setdefault(key, size)):
                raise UserError(
                    f"videos of {stream.path} must have one size for a LeRobot dataset, got "
                    f"{first[0]}x{first[1]} and, in {file.name}, {size[0]}x{size[1]} pixels; scale them, or "
                    f"{remedy}."
                )


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
        stream: data whose source has `lerobot_parts`.
        out: folder to create.
        pieces: in the order of the new episodes.
        remedy: advice, for messages.
        state_size: size of the state of zeros for data without a state.
        names: column -> `names` of its feature.

    Raises:
        UserError: as in `convert`.
    """
    parts, episodes = _collect(stream, sorted({piece.number for piece in pieces}), remedy)
    features = {name: feature for name, feature in parts.features.items() if not name.startswith("action")}
    features.setdefault(STATE, {"dtype": "float32", "shape": (state_size,), "names": None})
    for name, values in pieces[0].columns.items():
        features[name] = {"dtype": str(values.dtype), "shape": values.shape[1:], "names": names.get(name)}
    written = []
    for piece in pieces:
        if piece.number in episodes:
            rows = slice(piece.first, piece.first + len(piece.columns["action"]))
            columns = _with_columns(episodes[piece.number].columns, piece, features)
            written.append(replace(episodes[piece.number], rows=rows, columns=columns))
    _write(out, features, stream.fps, parts.robot_type, written, remedy)


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
) -> tuple[LeRobotParts, dict[int, EpisodeData]]:
    """Return the same as `_episodes`, with the size of the first frames."""
    parts, episodes = _episodes(stream, numbers, remedy)
    first = next(iter(episodes.values()))
    for key, file in first.videos.items():  # the size in the metadata may be wrong
        shape = next(decode(file))[1].shape
        parts.features[key] |= {"shape": shape, "names": ["height", "width", "channels"]}
    return parts, episodes


def _episodes(
    stream: FrameStream, numbers: Sequence[int], remedy: str
) -> tuple[LeRobotParts, dict[int, EpisodeData]]:
    """Return the parts of the dataset, and of each episode whose video files exist."""
    parts, fps = stream.source.lerobot_parts(), stream.fps
    if parts is None:
        raise UserError(f"{stream.path} must be a LeRobot dataset or a folder of videos; {remedy}.")
    episodes = {number: parts.episode(number) for number in numbers}
    for episode in episodes.values():
        for file in episode.videos.values() if episode.times is None else ():
            if file.suffix.lower() != ".mp4":
                raise UserError(f"{file} must be an mp4 file for a LeRobot dataset; {remedy}.")
    episodes = {n: e for n, e in episodes.items() if all(file.is_file() for file in e.videos.values())}
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
    return parts, episodes


def _write(
    out: Path, features: dict[str, Any], fps: float, robot: Any, episodes: list[EpisodeData], remedy: str
) -> None:
    try:
        write_episodes(out, features, round(fps), robot, episodes)
    except Unreadable as error:
        raise UserError(f"{error}; {remedy}, or replace it.") from error
