"""Episodes in npz files: `obs` uint8 [n, h, w, c]; optional `action` (or `ta`), `states`, `done` and `fps`.

Reads the expert data published by LAPO (https://github.com/schmidtdominik/LAPO), and grids of integer
features such as XLand's 5x5x2. A file is one stream of n steps. `done` marks the last frame of an episode or,
as in the rollout buffers of CleanRL and LAPO, the first one; the frames decide, because they change most
between episodes. Unlike in LAPO's own loader, no window crosses such an end. `observations` [e, n, h, w, c]
holds e episodes of n steps, and the other arrays then also start with the axes [e, n].

Integer actions [n] are classes, floating-point actions [n, a] are continuous. An array whose type or shape
does not fit its frames makes the file unreadable; `_scan` decides.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, Shaped, UInt8

from latentact.data.digest import Memo, blake2b, file_digest
from latentact.data.files import files_below, printable
from latentact.data.format import (
    FASTEST,
    FORMATS,
    SLOWEST,
    UNTIMED,
    EpisodeMetadata,
    Source,
    Unreadable,
    discrete_space,
)
from latentact.data.formats.video_folder import has_videos
from latentact.errors import UserError
from latentact.io.arrays import DAMAGED
from latentact.types import ActionSpace

_SMALLEST_IMAGE = 32
_SUFFIXES = (".npz",)
_ACTIONS = ("action", "ta")
_FRAMES = ("obs", "observations")
_CLEAR = 1.5
"""Ratio of the frame changes before and after `done` above which the larger one is taken as the cut."""
_KINDS = {"b": "integer", "i": "integer", "u": "integer", "f": "float"}
"""numpy's kind -> type of a column."""


@FORMATS.register("npz")
class Npz:
    """A `.npz` file, or a folder of them."""

    @staticmethod
    def detect(path: Path) -> bool:
        """Return whether `path` is an npz file, or a folder with npz files that no other format reads."""
        if not path.is_dir():
            return path.is_file() and path.suffix.lower() in _SUFFIXES
        return (
            not (path / "meta/info.json").exists()
            and not has_videos(path)
            and bool(files_below(path, _SUFFIXES)[0])
        )

    @staticmethod
    def open(path: Path, camera: str, memo: Memo) -> NpzSource:
        """Return the episodes of every file, in the order of the file names.

        Raises:
            UserError: a camera is given.
        """
        if camera:
            raise UserError(f"{path} has no camera {camera!r}: it is a set of arrays; leave `camera` empty.")
        return NpzSource(path, memo)


class NpzSource(Source):
    """The episodes of npz files.

    Args:
        path: a file or a folder.
        memo: cache of file scans.
    """

    camera = ""
    kind = "npz episodes"
    uneven = False
    action_names = ()
    tasks = ()

    def __init__(self, path: Path, memo: Memo) -> None:
        """Scan every file.

        Raises:
            UserError: the files have columns of different types or shapes.
        """
        self._path = path
        root = path if path.is_dir() else path.parent
        files, self.skipped = files_below(path, _SUFFIXES)
        self.unreadable, self.notes, self.episodes = {}, [], []
        first_rows: list[int] = []
        self._spans: list[tuple[Path, int, int]] = []
        self._files: dict[Path, tuple[int, ...]] = {}
        scans: dict[str, dict[str, Any]] = {}
        row = 0
        for file in files:
            name = printable(file.relative_to(root))
            scan: dict[str, Any] = memo.get(file, "npz.6", _scan)
            first = next(iter(scans.values()), scan)
            if "error" not in scan and scan["fps"] != first["fps"]:
                rates = f"{scan['fps']:g} and the files before it {first['fps']:g}"
                scan = {"error": f"it has {rates} frames per second; use one folder per rate"}
            if "error" in scan:
                self.unreadable[name] = scan["error"]
                continue
            scans[name] = scan
            self._files[file] = tuple(scan["axes"])
        starts = self._done_starts(scans)
        for file, scan in zip(self._files, scans.values(), strict=True):
            name = printable(file.relative_to(root))
            for place, (begin, end) in enumerate(_spans(scan, starts)):
                content = blake2b(scan["digest"].encode(), b"%d:%d" % (begin, end))
                label = f"{name} #{place}"
                self.episodes.append(
                    EpisodeMetadata(name=label, file=name, task="", frames=end - begin, content=content)
                )
                first_rows.append(row + begin)
                self._spans.append((file, begin, end))
            row += scan["rows"]
        self.first_rows = first_rows
        self.resizable = all(scan["image"] for scan in scans.values())
        self.fps = float(next(iter(scans.values()))["fps"]) if scans else 1.0
        self.untimed = not all(scan["timed"] for scan in scans.values())
        if self.untimed:
            self.notes.append(UNTIMED.format(self.fps))
        shapes = {tuple(scan["shape"]): name for name, scan in scans.items()}
        if len(shapes) > 1:
            different = ", ".join(f"{list(shape)} in {name}" for shape, name in [*shapes.items()][:3])
            self.notes.append(f"frames differ in shape: {different}; resolution 0 and grids must have one")
        for shape, name in shapes.items():
            if min(shape[:2]) >= _SMALLEST_IMAGE and shape[2] not in (1, 3):
                self.notes.append(
                    f"frames of {shape[2]} channels, such as in {name}, are grids of features, not images"
                )
        self._columns = self._common_columns(path, scans)
        self.action_space = _space(path, [scan["classes"] for scan in scans.values()], self._columns)
        self._lock = threading.Lock()
        self._obs = functools.lru_cache(maxsize=2)(self._read_obs)

    def set_fps(self, fps: float) -> None:
        """Set the frame rate."""
        self.notes.remove(UNTIMED.format(self.fps))
        self.fps = fps

    def frames(self, number: int) -> Iterator[tuple[float, UInt8[np.ndarray, "h w c"]]]:
        """Yield (seconds, observation) of an episode."""
        file, begin, end = self._spans[number]
        with self._lock:
            obs = self._obs(file)
        for step in range(begin, end):
            yield (step - begin) / self.fps, obs[step]

    def column(self, name: str) -> Shaped[np.ndarray, " rows *shape"] | None:
        """Return an array that every file has, over all files: float32, integer or bool."""
        name = "states" if name == "observation.state" else name
        checked = name in ("states", "action")
        if not self._files or name in (*_FRAMES, "fps") or (checked and name not in self._columns):
            return None
        if not checked and not all(name in _load(file) for file in self._files):
            return None
        try:
            return np.concatenate([_column(_load(file), name, axes) for file, axes in self._files.items()])
        except Unreadable as error:
            raise UserError(f"{self._path}: {error}; repair the array or remove it.") from error

    def row_tasks(self, number: int) -> Int64[np.ndarray, " n"]:
        """Return -1 for each step: arrays have no tasks."""
        return np.full(self.episodes[number].frames, -1)

    def _done_starts(self, scans: dict[str, dict[str, Any]]) -> bool:
        """Return whether `done` marks first frames, where frames change more than those after them.

        If the changes are similar, a mark in the first row decides: no episode ends there.
        """
        into, out = (sum(scan["done_changes"][i] for scan in scans.values()) for i in (0, 1))
        if into * _CLEAR < out or not any(scan["done"] for scan in scans.values()):
            return False
        starts = into > _CLEAR * out or any(scan["done"][:1] == [0] for scan in scans.values())
        if starts:
            self.notes.append("`done` marks the first frame of an episode, not the last")
        elif into:
            self.notes.append(
                "`done` is taken as the last frame of an episode, although the frames are inconclusive"
            )
        return starts

    def _read_obs(self, file: Path) -> UInt8[np.ndarray, "n h w c"]:
        arrays = _load(file)
        obs = arrays[_frames(arrays)]
        return obs.reshape(-1, *obs.shape[-3:])

    def _common_columns(self, path: Path, scans: dict[str, dict[str, Any]]) -> dict[str, list[Any]]:
        """Return the kind and shape of each column that all files have; others are left out with a note.

        Raises:
            UserError: a column differs in kind or shape between files.
        """
        columns: dict[str, list[Any]] = {}
        for name in dict.fromkeys(column for scan in scans.values() for column in scan["columns"]):
            found = {file: scan["columns"][name] for file, scan in scans.items() if name in scan["columns"]}
            file, (kind, shape) = next(iter(found.items()))
            for other, (got_kind, got_shape) in found.items():
                if [got_kind, got_shape] != [kind, shape]:
                    raise UserError(
                        f"{path}: `{name}` must have the same type and shape in every file, got {kind} "
                        f"[n{_more(shape)}] in {file} and {got_kind} [n{_more(got_shape)}] in {other}; put "
                        f"them into separate folders."
                    )
            if len(found) == len(scans):
                columns[name] = [kind, shape]
                continue
            lacking = [other for other in scans if other not in found]
            self.notes.append(
                f"column {name} is missing from {len(lacking)} of {len(scans)} files, such as {lacking[0]}, "
                f"and left out"
            )
        return columns


def _spans(scan: dict[str, Any], starts: bool) -> list[tuple[int, int]]:
    """Return [begin, end) of the episodes of a file.

    Args:
        scan: of the file.
        starts: whether `done` marks the first frame of an episode, not the last.
    """
    length = scan["axes"][-1]
    cuts = {*range(0, scan["rows"], length), *(row + (not starts) for row in scan["done"])}
    inner = sorted(cuts - {0, scan["rows"]})
    return [*itertools.pairwise([0, *inner, scan["rows"]])]


def _done_changes(
    obs: UInt8[np.ndarray, "n h w c"], done: Int64[np.ndarray, " d"], length: int
) -> tuple[float, float]:
    """Return the mean absolute changes into and out of up to 100 frames that `done` marks.

    Args:
        obs: frames.
        done: rows that are marked.
        length: rows of a stream; the changes between two streams are no evidence.
    """
    inside = done[(done % length > 0) & (done % length < length - 1)]
    rows = inside[:: max(1, len(inside) // 100)]
    at = obs[rows].astype(np.int16)
    changes = [float(np.abs(obs[rows + step] - at).mean()) if len(rows) else 0.0 for step in (-1, 1)]
    return changes[0], changes[1]


def _more(shape: list[int]) -> str:
    return "".join(f", {size}" for size in shape)


def _space(path: Path, classes: list[list[int]], columns: dict[str, list[Any]]) -> ActionSpace | None:
    """Return the action space of all files; None where one has no actions."""
    if "action" not in columns:
        return None
    kind, shape = columns["action"]
    if kind == "float":
        return ActionSpace(kind="continuous", size=shape[0])
    try:
        return discrete_space(np.unique(np.concatenate([np.array(each, np.int64) for each in classes])))
    except ValueError as error:
        raise UserError(f"{path}, `action`: {error}; store numbers as float32.") from error


def _load(file: Path) -> np.lib.npyio.NpzFile:
    return np.load(file, allow_pickle=False)


def _frames(arrays: np.lib.npyio.NpzFile) -> str:
    return next(name for name in _FRAMES if name in arrays)


def _column(
    arrays: np.lib.npyio.NpzFile, name: str, axes: tuple[int, ...]
) -> Shaped[np.ndarray, " n *shape"]:
    """Return an array with one row per frame, as float32, integer or bool.

    Args:
        arrays: the file.
        name: name of the array; `action`: classes int64 `[n]` or float32 `[n, a]`, whatever its name.
        axes: axes of the frames before height, width and channels: (n,) or (episodes, steps).

    Raises:
        Unreadable: the type or shape does not fit the frames.
    """
    stored = next(key for key in _ACTIONS if key in arrays) if name == "action" else name
    values = arrays[stored]
    if values.dtype.kind not in "biuf":
        raise Unreadable(f"`{stored}` must hold numbers, got {values.dtype}")
    if values.shape[: len(axes)] != axes:
        got = f"got {list(values.shape)}"
        rows = f"one row for each of {axes[0]} frames" if len(axes) == 1 else f"the axes {list(axes)} first"
        raise Unreadable(f"`{stored}` must have {rows}, {got}")
    values = values.reshape(-1, *values.shape[len(axes) :])
    if values.dtype.kind == "f":
        with np.errstate(over="ignore"):  # beyond float32: infinite, which readers report by row
            values = values.astype(np.float32)
        return values.reshape(len(values), -1) if name == "action" else values
    if values.dtype.kind == "u" and values.size and values.max() > np.iinfo(np.int64).max:
        row = int(np.argmax(values.reshape(len(values), -1).max(1) > np.iinfo(np.int64).max))
        raise Unreadable(f"`{stored}` must be at most 2**63 - 1, got {values.max()} in row {row}")
    if name != "action":
        return values
    if values.size != len(values):
        raise Unreadable(
            f"`{stored}` of {values.dtype} must have one class per frame, got {list(values.shape)}; store "
            f"continuous actions as float32"
        )
    return values.reshape(-1).astype(np.int64)


def _done(arrays: np.lib.npyio.NpzFile, axes: tuple[int, ...]) -> Bool[np.ndarray, " n"]:
    """Return the mask of the last frames of episodes.

    Raises:
        Unreadable: `done` is not one boolean per frame.
    """
    values = _column(arrays, "done", axes)
    if values.size != len(values):
        raise Unreadable(f"`done` must have one flag per frame, got {list(values.shape)}")
    values = values.reshape(-1)
    wrong = np.flatnonzero((values != 0) & (values != 1))
    if len(wrong):
        raise Unreadable(f"`done` must be 0 or 1, got {values[wrong[0]]} in row {wrong[0]}")
    return values.astype(bool)


def _fps(arrays: np.lib.npyio.NpzFile) -> float:
    """Return the frames per second.

    Raises:
        Unreadable: `fps` is not a number in the allowed range.
    """
    values = arrays["fps"]
    if values.dtype.kind not in "iuf" or values.size != 1 or not SLOWEST <= values.item() <= FASTEST:
        got = values.item() if values.size == 1 else f"{values.dtype} {list(values.shape)}"
        raise Unreadable(f"`fps` must be one number between {SLOWEST:g} and {FASTEST:g}, got {got!r}")
    return float(values.item())


def _obs_shape(arrays: np.lib.npyio.NpzFile) -> tuple[int, ...]:
    """Return the shape of the frames.

    Raises:
        Unreadable: they are not uint8 images or grids with channels last.
    """
    name = _frames(arrays)
    obs = arrays[name]
    if obs.ndim not in (4, 5) or obs.dtype != np.uint8 or not obs.size:
        raise Unreadable(f"`{name}` must be uint8 [n, h, w, c], got {obs.dtype} {list(obs.shape)}")
    if obs.shape[-3] < _SMALLEST_IMAGE <= min(obs.shape[-2:]):
        raise Unreadable(
            f"`{name}` must be [n, h, w, c], got {list(obs.shape)}, whose channels come first; transpose it"
        )
    return obs.shape


def _scan(file: Path) -> dict[str, Any]:
    """Return the contents of a file as plain JSON values, or {"error": reason why it is unreadable}.

    Returns:
        digest; rows; done: rows where it is set; done_changes: changes of the frames into and out of these
        rows; axes: those before height, width and channels; shape: of a frame; image: whether frames are
        images; columns: name -> [kind, shape of a row]; classes of a discrete action; fps; timed: whether the
        file has an fps.
    """
    try:
        arrays = _load(file)
        if not isinstance(arrays, np.lib.npyio.NpzFile) or not any(name in arrays for name in _FRAMES):
            return {"error": "it has no array `obs`"}
        return _contents(file, arrays)
    except Unreadable as error:
        return {"error": str(error)}
    except DAMAGED as error:
        return {"error": f"it is not a file of plain arrays ({error})"}


def _contents(file: Path, arrays: np.lib.npyio.NpzFile) -> dict[str, Any]:
    *axes, height, width, channels = _obs_shape(arrays)
    rows = math.prod(axes)
    done = np.zeros(0, np.int64)
    if "done" in arrays:
        done = np.flatnonzero(_done(arrays, tuple(axes)))
    changes = (0.0, 0.0)
    if len(done):
        changes = _done_changes(
            arrays[_frames(arrays)].reshape(rows, height, width, channels), done, axes[-1]
        )
    columns: dict[str, list[Any]] = {}
    classes: list[int] = []
    for name in ("states", "action"):
        if name not in arrays and not (name == "action" and any(key in arrays for key in _ACTIONS)):
            continue
        values = _column(arrays, name, tuple(axes))
        columns[name] = [_KINDS[values.dtype.kind], list(values.shape[1:])]
        if name == "action" and values.ndim == 1:
            classes = np.unique(values).tolist()
            try:
                discrete_space(values)
            except ValueError as error:
                raise Unreadable(f"`action`: {error}; store numbers as float32") from error
    return {
        "digest": file_digest(file),
        "rows": rows,
        "done": done.tolist(),
        "done_changes": changes,
        "image": channels in (1, 3) and min(height, width) >= _SMALLEST_IMAGE,
        "axes": axes,
        "shape": [height, width, channels],
        "columns": columns,
        "classes": classes,
        "fps": _fps(arrays) if "fps" in arrays else 1.0,
        "timed": "fps" in arrays,
    }
