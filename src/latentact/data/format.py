"""Datasets on disk: the `Format` extension point.

To add a format, put one file into `latentact/data/formats` (or into your own package, under the entry-point
group `latentact.data.formats`) with a class that is registered under its name::

    @FORMATS.register("my_format")
    class MyFormat:
        @staticmethod
        def detect(path: Path) -> bool: ...      # exactly one format may claim a path

        @staticmethod
        def open(path: Path, camera: str, memo: Memo) -> Source: ...

`open` reads metadata (names, tasks, lengths) and returns a `Source`, which decodes one episode at a time.
`tests/conformance/test_formats.py` checks every registered format.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64, Shaped, UInt8

from latentact.data.digest import Memo
from latentact.data.files import files_below
from latentact.errors import UserError, did_you_mean
from latentact.registry import Registry
from latentact.types import ActionSpace

SLOWEST, FASTEST = 1e-4, 1e6
"""Frames per second that data may have."""
_MOST_CLASSES = 4096


class Unreadable(Exception):
    """An episode's frames cannot be decoded; the message gives the reason, without the file's name."""


@dataclass(frozen=True, kw_only=True)
class Episode:
    """Metadata of one episode, known without decoding."""

    name: str
    """Human-readable name."""
    file: str
    """The file that holds its frames, relative to the dataset."""
    task: str
    """Task text; empty if it has none; all texts, in order, if it changes."""
    frames: int
    """Frames in the data, before resampling."""
    content: str
    """Digest of the bytes that determine its frames and their times."""

    @property
    def label(self) -> str:
        """Name for messages."""
        return self.name if self.name == self.file else f"{self.name} in {self.file}"


@runtime_checkable
class Source(Protocol):
    """An opened dataset: its metadata, and its frames one episode at a time.

    `frames` is called from several threads at once, each for a different episode. A source in shards also
    has `groups` (first episode, and last + 1, of each shard) and `damaged` (shards that are rejected unless
    `no_strict` is set: name -> reason). A source with random access to frames is an `access.RandomAccess`.
    """

    camera: str
    """Camera key; empty for plain video."""
    fps: float
    """Frames per second."""
    uneven: bool
    """Whether the rate varies, inside a video or between videos; all are then resampled to `fps`, the
    slowest."""
    resizable: bool
    """Whether frames are images; otherwise they are grids of integers, which are not resized."""
    episodes: Sequence[Episode]
    """The readable episodes, in the order of the data."""
    first_rows: Sequence[int]
    """For each episode, its first row in `column`."""
    unreadable: Mapping[str, str]
    """Files and episodes that cannot be read: name -> reason."""
    skipped: Mapping[str, str]
    """Files that this format skips: relative name -> reason."""
    notes: Sequence[str]
    """Sentences about data that the reader repaired or skipped."""
    tasks: Sequence[str]
    """Task texts, each once."""
    action_space: ActionSpace | None
    """Action space; None if the data has no actions."""
    action_names: tuple[str, ...]
    """Names of the classes of a discrete action, or of the dimensions of a continuous one; may be empty."""

    def frames(self, number: int) -> Iterator[tuple[float, UInt8[np.ndarray, "h w c"]]]:
        """Yield (seconds, frame) for `episodes[number]`.

        Raises:
            Unreadable: the file is damaged, or has fewer frames than its metadata lists.
        """
        ...

    def column(self, name: str) -> Shaped[np.ndarray, " rows *shape"] | None:
        """Return all rows of a numeric column; None if the data has no column of this name.

        A row without a value is NaN, also in integer columns. A discrete `action` holds the data's own
        values.

        Raises:
            UserError: the column is damaged, or its rows have different sizes.
        """
        ...

    def row_tasks(self, number: int) -> Int64[np.ndarray, " n"]:
        """Return the index into `tasks` of each frame of an episode, before resampling; -1: no task."""
        ...


@runtime_checkable
class Format(Protocol):
    """A dataset format on disk."""

    def detect(self, path: Path) -> bool:
        """Return whether this format, and no other, reads `path`, which may be a pattern for files."""
        ...

    def open(self, path: Path, camera: str, memo: Memo) -> Source:
        """Open the data at `path`.

        Args:
            path: file or folder for which `detect` is true.
            camera: camera key, or empty for the only one.
            memo: cache of facts about files that are slow to determine.

        Raises:
            UserError: the data is inconsistent, or the camera is unknown or must be given.
        """
        ...


FORMATS: Registry[Format] = Registry("format", "latentact.data.formats")


def open_source(path: Path, camera: str, memo: Memo) -> Source:
    """Open the dataset at `path` with the format that reads it.

    Raises:
        UserError: `path` does not exist, or no format reads it.
    """
    fitting = [name for name in FORMATS.names() if FORMATS.get(name).detect(path)]
    if not path.exists() and not fitting:
        raise UserError(f"{path} does not exist; give a LeRobot dataset, a folder of videos or a video file.")
    if len(fitting) != 1:
        found = f"is claimed by several formats: {', '.join(fitting)}"
        if not fitting:
            skipped = files_below(path, ())[1]
            name, reason = next(iter(skipped.items()), ("", ""))
            more = f" ({len(skipped)} files skipped, such as {name}: {reason})" if skipped else ""
            found = f"holds no data that can be read{more}"
        raise UserError(
            f"{path} {found}; give a LeRobot dataset (meta/info.json of version 2 or 3), a video, or a "
            f"folder with videos (mp4, webm, mkv, mov, gif, avi and others), npz episodes or tars. Formats: "
            f"{', '.join(FORMATS.names())}."
        )
    return FORMATS.get(fitting[0]).open(path, camera, memo)


def discrete_space(values: np.ndarray, names: tuple[str, ...] = ()) -> ActionSpace:
    """Return the space of discrete actions: its classes are the names, or else the values that occur.

    Args:
        values: integers; NaN: no action.
        names: names of the classes 0, 1, ...; may be empty.

    Raises:
        ValueError: the values have more than 4,096 classes, or exceed int64.
    """
    known = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    found = np.unique(known)
    if len(found) and (int(found[-1]) >= 2**63 or int(found[0]) < -(2**63)):
        raise ValueError(f"discrete actions must lie between -2**63 and 2**63 - 1, got {found[-1]}")
    found = found.astype(np.int64)
    size = max(len(names), len(found), 1)
    if size > _MOST_CLASSES:
        raise ValueError(f"discrete actions must have at most {_MOST_CLASSES} classes, got {size}")
    plain = not len(found) or (found[0] >= 0 and found[-1] < max(len(names), len(found)))
    if plain:
        return ActionSpace(kind="discrete", size=size)
    return ActionSpace(kind="discrete", size=len(found), values=tuple(found.tolist()))


def choose_camera(cameras: Sequence[str], camera: str, path: Path) -> str:
    """Return `camera`, or the only camera if it is empty.

    Raises:
        UserError: no camera has this name, or several exist and none is given.
    """
    known = ", ".join(cameras)
    if not cameras:
        raise UserError(f"{path} has no camera; give a dataset with images or videos.")
    if camera and camera not in cameras:
        raise UserError(f"{path} has no camera {camera!r}{did_you_mean(camera, cameras)}")
    if not camera and len(cameras) != 1:
        raise UserError(f"{path} has {len(cameras)} cameras ({known}); choose one with `camera`.")
    return camera or cameras[0]
