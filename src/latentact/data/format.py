"""Datasets on disk: the `Format` extension point.

To add a format, put one file into `latentact/data/formats` (or into your own package, under the entry-point
group `latentact.data.formats`) with a class that is registered under its name::

    @FORMATS.register("my_format")
    class MyFormat:
        @staticmethod
        def detect(path: Path) -> bool: ...      # exactly one format may claim a path

        @staticmethod
        def open(path: Path, camera: str, memo: Memo) -> Source: ...

`open` reads metadata (names, tasks, lengths) and returns a subclass of `Source`, which decodes one episode at
a time and declares what else its data can serve. `latentact.check_format` checks a format.
"""

from __future__ import annotations

import itertools
import types
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64, Int64, Shaped, UInt8

from latentact.data.digest import Memo
from latentact.data.files import files_below
from latentact.errors import UserError, did_you_mean
from latentact.registry import Registry
from latentact.types import ActionSpace

SLOWEST, FASTEST = 1e-4, 1e6
"""Frames per second that data may have."""
VIDEO_KEY = "observation.images.video"
"""Camera key of plain video in a LeRobot dataset."""
_MOST_CLASSES = 4096
COLUMNS = ("action", "observation.state")
"""Columns that commands use if the data has them."""


class CameraRequired(UserError):
    """The data has several cameras and none was given."""

    def __init__(self, path: Path, cameras: Sequence[str]) -> None:
        known = ", ".join(cameras)
        super().__init__(f"{path} has {len(cameras)} cameras ({known}); choose one with `camera`.")
        self.cameras = list(cameras)


class Unreadable(Exception):
    """An episode's frames cannot be decoded; the message gives the reason, without the file's name."""


@dataclass(frozen=True, kw_only=True)
class EpisodeMetadata:
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


@dataclass(frozen=True, kw_only=True)
class EpisodeData:
    """Files and columns of one episode, to write it into a LeRobot dataset."""

    label: str
    """Name in messages."""
    times: Float64[np.ndarray, " n"] | None
    """Time of each row in seconds; None: every frame of the video is a row."""
    tasks: list[str]
    """Task text of each row, or a single text for all rows."""
    videos: dict[str, Path]
    """Camera -> video file."""
    columns: Callable[[], dict[str, Any]]
    """Returns the numeric, text and image columns."""
    starts: dict[str, float] = field(default_factory=dict)
    """Camera -> time in its video, in seconds, at time 0 of the rows, if not 0."""
    rows: slice = field(default_factory=lambda: slice(None))
    """Rows to write."""


@dataclass(frozen=True, kw_only=True)
class LeRobotParts:
    """A dataset as the parts of a LeRobot dataset."""

    features: dict[str, Any]
    """Name -> feature of each column and camera, as in `meta/info.json`; the shape of videos may be wrong."""
    episode: Callable[[int], EpisodeData]
    """Returns the parts of `episodes[number]`; its video files may be missing."""
    robot_type: Any = None
    """Robot type for the metadata."""


UNTIMED = "no frame rate is stated: {:g} frames per second are assumed, unless data.fps is set"
"""Note of a source with `untimed`."""


@dataclass(kw_only=True)
class FormatFindings:
    """What `check-data` reports about one format alone."""

    warnings: list[str] = field(default_factory=list)
    """Inconsistencies, each in one sentence without a full stop."""
    clocks: dict[str, int] = field(default_factory=dict)
    """Number of episodes by kind of `timestamp` column: regular, offset, gaps, jitter, impossible."""


@runtime_checkable
class Source(Protocol):
    """An opened dataset: its metadata, and its frames one episode at a time.

    A format subclasses it. Attributes from `kind` on and methods from `times` on have defaults; they declare
    what else commands can do with the data. `frames` is called from several threads at once, each for a
    different episode.
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
    episodes: list[EpisodeMetadata]
    """The readable episodes, in the order of the data."""
    first_rows: Sequence[int]
    """For each episode, its first row in `column`."""
    unreadable: dict[str, str]
    """Files and episodes that cannot be read: name -> reason."""
    skipped: dict[str, str]
    """Files that this format skips: relative name -> reason."""
    notes: list[str]
    """Sentences about data that the reader repaired or skipped."""
    tasks: Sequence[str]
    """Task texts, each once."""
    action_space: ActionSpace | None
    """Action space; None if the data has no actions."""
    action_names: tuple[str, ...]
    """Names of the classes of a discrete action, or of the dimensions of a continuous one; may be empty."""

    untimed: bool = False
    """Whether an episode has no frame rate of its own; it is then guessed, and `set_fps` sets it."""
    kind: str = "dataset"
    """Kind of the data for people, such as "folder of videos"."""
    groups: Sequence[tuple[int, int]] = ()
    """First episode, and last + 1, of each shard; empty for data that is not in shards."""
    damaged: Mapping[str, str] = types.MappingProxyType({})
    """Shards that are rejected unless `no_strict` is set: name -> reason."""
    random_access: bool = False
    """Whether `frame` is fast for any frame, so that no cache is needed."""
    scene_cuts: bool = False
    """Whether an episode may contain scene cuts, as edited video does."""
    numeric_columns: Sequence[str] = COLUMNS
    """Names of the numeric columns, for `check-data`."""
    sizes: Sequence[tuple[int, int]] = ()
    """Distinct widths and heights of the frames, where they are known without opening `video_files`."""
    video_files: Sequence[Path] = ()
    """Video files that hold the frames, each once; empty if they are images or arrays."""
    whole_videos: bool = False
    """Whether episode i is the whole of `video_files[i]`."""
    lerobot_version: str = ""
    """`codebase_version` of a LeRobot dataset; empty for other data."""
    missing_episodes: int = 0
    """Number of listed episodes whose files are missing."""

    @abstractmethod
    def frames(self, number: int) -> Iterator[tuple[float, UInt8[np.ndarray, "h w c"]]]:
        """Yield (seconds, frame) for `episodes[number]`.

        Raises:
            Unreadable: the file is damaged, or has fewer frames than its metadata lists.
        """
        ...

    @abstractmethod
    def column(self, name: str) -> Shaped[np.ndarray, " rows *shape"] | None:
        """Return all rows of a numeric column; None if the data has no column of this name.

        A row without a value is NaN, also in integer columns. A discrete `action` holds the data's own
        values.

        Raises:
            UserError: the column is damaged, or its rows have different sizes.
        """
        ...

    @abstractmethod
    def row_tasks(self, number: int) -> Int64[np.ndarray, " n"]:
        """Return the index into `tasks` of each frame of an episode, before resampling; -1: no task."""
        ...

    def set_fps(self, fps: float) -> None:
        """Set the frame rate of the episodes that have none of their own; called before anything is read."""
        self.fps = fps

    def times(self, number: int) -> Float64[np.ndarray, " n"]:
        """Return the time of each frame of an episode, in seconds since its first frame."""
        return np.array([seconds for seconds, _ in self.frames(number)], np.float64)

    def frame(self, number: int, index: int) -> UInt8[np.ndarray, "h w c"]:
        """Return a frame of an episode.

        Raises:
            Unreadable: the frame is damaged.
        """
        return next(itertools.islice(self.frames(number), index, None))[1]

    def image_modes(self) -> Sequence[str]:
        """Return Pillow's modes of some images; empty for frames that are not stored as images."""
        return ()

    def table_rows(self) -> tuple[Int64[np.ndarray, " rows"], Int64[np.ndarray, " rows"]] | None:
        """Return `episode_index` and `frame_index` of each row of `column`; None: number them from 0."""
        return None

    def findings(self) -> FormatFindings:
        """Return what `check-data` reports about this format alone."""
        return FormatFindings()

    def lerobot_problems(self) -> Iterable[str]:
        """Return what keeps LeRobot from opening this data, or its conversion to version 3."""
        return ()

    def lerobot_parts(self) -> LeRobotParts | None:
        """Return the parts of a LeRobot dataset; None: the data cannot become one.

        By default whole videos can, with their state and action.
        """
        return _video_parts(self) if self.whole_videos else None


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
            UserError: the data is inconsistent, or the camera is unknown; a `CameraRequired` (raised by
                `choose_camera`) if it must be given.
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
    source = FORMATS.get(fitting[0]).open(path, camera, memo)
    if not isinstance(source, Source):  # of a package that was written before `Source` had defaults
        name = type(source).__name__
        warnings.warn(f"{name} must subclass latentact.data.format.Source", DeprecationWarning, stacklevel=2)
        declared = types.new_class(name, (type(source), Source))
        object.__setattr__(source, "__class__", declared)  # also of a frozen dataclass
    return source


def _video_parts(source: Source) -> LeRobotParts:
    """Return the parts of a LeRobot dataset from a source of whole videos."""
    camera = source.camera or VIDEO_KEY
    columns = {name: values for name in COLUMNS if (values := source.column(name)) is not None}
    features: dict[str, Any] = {camera: {"dtype": "video", "shape": (0, 0, 3), "names": None}}
    for name, values in columns.items():
        dtype = "float32" if values.dtype.kind == "f" else "int64"
        features[name] = {"dtype": dtype, "shape": values.shape[1:] or (1,), "names": None}
    if source.action_space and source.action_names:
        names = list(source.action_names)
        features["action"]["names"] = {"classes": names} if source.action_space.discrete else names

    def episode(number: int) -> EpisodeData:
        found, first = source.episodes[number], source.first_rows[number]
        texts = ["" if task < 0 else source.tasks[int(task)] for task in source.row_tasks(number)]
        return EpisodeData(
            label=found.name,
            times=None,
            tasks=texts if len(set(texts)) > 1 else texts[:1],
            videos={camera: source.video_files[number]},
            columns=lambda: {
                name: values[first : first + found.frames].astype(features[name]["dtype"])
                for name, values in columns.items()
            },
        )

    return LeRobotParts(features=features, episode=episode)


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
        UserError: no camera has this name; a `CameraRequired` if several exist and none is given.
    """
    if not cameras:
        raise UserError(f"{path} has no camera; give a dataset with images or videos.")
    if camera and camera not in cameras:
        raise UserError(f"{path} has no camera {camera!r}{did_you_mean(camera, cameras)}")
    if not camera and len(cameras) != 1:
        raise CameraRequired(path, cameras)
    return camera or cameras[0]


def __getattr__(name: str) -> Any:
    if name != "Episode":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{__name__}.Episode is deprecated; use EpisodeMetadata.", DeprecationWarning, stacklevel=2)
    return EpisodeMetadata
