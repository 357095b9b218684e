"""`check_format`: does a data format keep its contract? The counterpart of Gymnasium's `check_env`."""

from __future__ import annotations

import itertools
import math
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from latentact.data.digest import Memo
from latentact.data.format import Format, Source
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
    missing = [name for name in Source.__annotations__ if not hasattr(source, name)]
    missing += [
        name for name in ("frames", "column", "row_tasks") if not callable(getattr(source, name, None))
    ]
    _require(
        not missing, "the source must have every attribute and method of Source", f"no {', '.join(missing)}"
    )
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
    _frames(source)
    _columns(source)
    _tasks(source)


def _require(holds: bool, rule: str, got: object) -> None:
    if not holds:
        raise UserError(f"check_format: {rule}, got {got}.")


def _frames(source: Source) -> None:
    """Check the frames of every episode, decoded in threads and decoded alone."""
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
