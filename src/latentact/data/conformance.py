"""`check_format`: check that a data format keeps its contract, as Gymnasium's `check_env` does."""

from __future__ import annotations

import itertools
import math
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from latentact.data.digest import Memo
from latentact.data.format import COLUMNS, Format, Source
from latentact.errors import UserError


def check_format(format: Format, path: str | Path, camera: str = "") -> None:
    """Check that a format keeps the contracts of `Format` and `Source` on a small dataset.

    Args:
        format: a registered format, `FORMATS.get(name)`, or your own.
        path: a dataset of this format; all of its frames are decoded.
        camera: camera key; empty: the only one.

    Raises:
        UserError: a rule is broken; the message names it.
    """
    path = Path(path)
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder) / "empty"
        empty.mkdir()
        _require(bool(format.detect(path)), f"detect must be true for {path}", False)
        _require(not format.detect(empty), "detect must be false for an empty folder", True)
        source = format.open(path, camera, Memo(Path(folder), path))
        again = format.open(path, camera, Memo(Path(folder), path))
    _require(isinstance(source, Source), "open must return a subclass of Source", type(source).__name__)
    missing = [name for name in Source.__annotations__ if not hasattr(source, name)]
    _require(not missing, "the source must have every attribute of Source", f"no {', '.join(missing)}")
    _require(0 < source.fps < math.inf, "fps must be more than 0 and finite", source.fps)
    _require(len(source.episodes) > 0, "there must be at least one episode", 0)
    _require(
        len(source.first_rows) == len(source.episodes),
        "first_rows must have an entry for each episode",
        f"{len(source.first_rows)} for {len(source.episodes)}",
    )
    _require(
        [episode.content for episode in again.episodes] == [episode.content for episode in source.episodes]
        and all(episode.content for episode in source.episodes),
        "content must be a digest that is the same at each opening",
        "another or an empty one",
    )
    decoded = _frames(source)
    _columns(source)
    _tasks(source)
    _shards(source)
    _random_access(source, decoded)
    _videos(source, decoded)
    _lerobot(source)


type Decoded = list[tuple[float, np.ndarray]]


def _require(holds: bool, rule: str, got: object) -> None:
    if not holds:
        raise UserError(f"check_format: {rule}, got {got}.")


def _frames(source: Source) -> list[Decoded]:
    """Return the frames of every episode after checking them, decoded in threads and decoded alone."""
    numbers = range(len(source.episodes))
    with ThreadPoolExecutor(4) as pool:
        decoded = list(pool.map(lambda number: list(source.frames(number)), numbers))
    shapes = {frame.shape for _, frame in itertools.chain(*decoded)}
    _require(len(shapes) == 1, "all frames must have one shape", sorted(shapes))
    for number, frames in zip(numbers, decoded, strict=True):
        episode = source.episodes[number]
        _require(
            len(frames) == episode.frames,
            f"episode {episode.label} must have the {episode.frames} frames that it declares",
            len(frames),
        )
        _require(
            all(frame.dtype == np.uint8 and frame.ndim == 3 for _, frame in frames),
            f"frames of {episode.label} must be uint8 [h, w, c]",
            f"{frames[0][1].dtype} {list(frames[0][1].shape)}",
        )
        times = np.array([seconds for seconds, _ in frames], np.float64)
        _require(
            bool(np.isfinite(times).all() and (np.diff(times) > 0).all()),
            f"times of {episode.label} must be finite and increase",
            times.tolist()[:4],
        )
        alone = [frame for _, frame in source.frames(number)]
        _require(
            all(np.array_equal(a, b) for a, (_, b) in zip(alone, frames, strict=True)),
            f"frames of {episode.label} must be the same at each decoding, also in threads",
            "others",
        )
    return decoded


def _columns(source: Source) -> None:
    _require(source.column("no such column") is None, "an unknown column must be None", "values")
    rows = max(first + e.frames for first, e in zip(source.first_rows, source.episodes, strict=True))
    for name in ("action", "observation.state"):
        values = source.column(name)
        if values is not None:
            _require(
                len(values) >= rows, f"column {name} must have the {rows} rows of the episodes", len(values)
            )
    space, action = source.action_space, source.column("action")
    _require(
        space is None or action is not None,
        "a source with an action_space must have the column action",
        "none",
    )
    if space is None or action is None:
        return
    known = action[~np.isnan(action.astype(np.float64)).reshape(len(action), -1).any(1)]
    if space.discrete:
        allowed = space.values or range(space.size)
        strange = sorted({*np.unique(known).tolist()} - {*allowed})
        _require(not strange, f"discrete actions must be one of {space}", strange[:3])
    else:
        size = math.prod(action.shape[1:])
        _require(size == space.size, f"continuous actions must have {space.size} values", size)


def _tasks(source: Source) -> None:
    for number, episode in enumerate(source.episodes):
        tasks = source.row_tasks(number)
        _require(
            len(tasks) == episode.frames,
            f"row_tasks of {episode.label} must have a row per frame ({episode.frames})",
            len(tasks),
        )
        _require(
            bool(((tasks >= -1) & (tasks < len(source.tasks))).all()),
            f"row_tasks of {episode.label} must be from -1 to {len(source.tasks) - 1}",
            f"{tasks.min()} to {tasks.max()}",
        )


def _shards(source: Source) -> None:
    covered = [number for group in source.groups for number in range(*group)]
    _require(
        not source.groups or covered == [*range(len(source.episodes))],
        f"groups must cover the {len(source.episodes)} episodes in order",
        list(source.groups),
    )
    readable = sorted(source.damaged.keys() - source.unreadable.keys())
    _require(not readable, "damaged shards must also be unreadable", f"{readable} that are not")


def _random_access(source: Source, decoded: list[Decoded]) -> None:
    """Check that `times` and `frame` agree with `frames`, for the first and last frame of each episode."""
    for number, (episode, frames) in enumerate(zip(source.episodes, decoded, strict=True)):
        times, expected = source.times(number), [seconds for seconds, _ in frames]
        _require(
            len(times) == len(expected) and np.allclose(times, expected),
            f"times of {episode.label} must be those of its frames, {expected[:4]}",
            np.asarray(times).tolist()[:4],
        )
        for index in (len(frames) - 1, 0):
            _require(
                np.array_equal(source.frame(number, index), frames[index][1]),
                f"frame {index} of {episode.label} must be the same as in frames",
                "another one",
            )


def _videos(source: Source, decoded: list[Decoded]) -> None:
    lacking = [str(file) for file in source.video_files if not file.is_file()]
    _require(not lacking, "video_files must exist", lacking[:1])
    several = len(source.video_files) - len({*source.video_files})
    _require(not several, "video_files must list each file once", f"{several} of them twice")
    _require(
        not source.whole_videos or len(source.video_files) == len(source.episodes),
        f"a source with whole_videos must have a video file for each of {len(source.episodes)} episodes",
        len(source.video_files),
    )
    unknown = [name for name in source.numeric_columns if name not in COLUMNS and source.column(name) is None]
    _require(not unknown, "numeric_columns must be columns", unknown[:1])
    height, width = decoded[0][0][1].shape[:2]
    _require(
        not source.sizes or (width, height) in source.sizes,
        f"sizes must have that of the frames, {width}x{height}",
        list(source.sizes),
    )


def _lerobot(source: Source) -> None:
    """Check the parts of a LeRobot dataset: files, and a row for each frame in every column."""
    rows = source.table_rows()
    if rows is not None:
        needed = max(first + e.frames for first, e in zip(source.first_rows, source.episodes, strict=True))
        got = sorted({len(column) for column in rows})
        _require(
            len(got) == 1 and got[0] >= needed, f"table_rows must have the {needed} rows of the episodes", got
        )
    parts = source.lerobot_parts()
    if parts is None:
        return
    for number, episode in enumerate(source.episodes):
        found, label = parts.episode(number), episode.label
        lacking = [str(file) for file in found.videos.values() if not file.is_file()]
        _require(not lacking, f"the videos of lerobot_parts of {label} must exist", lacking[:1])
        columns = {name: len(column) for name, column in found.columns().items()}
        _require(
            {*columns, *found.videos} == {*parts.features},
            f"lerobot_parts of {label} must have the features {sorted(parts.features)}",
            sorted({*columns, *found.videos}),
        )
        if found.times is not None:
            columns["times"] = len(found.times)
        if len(found.tasks) != 1:
            columns["tasks"] = len(found.tasks)
        wrong = {name: count for name, count in columns.items() if count != episode.frames}
        _require(not wrong, f"lerobot_parts of {label} must have a row per frame ({episode.frames})", wrong)
