"""Episodes in npz files: `obs` uint8 [n, h, w, c]; optional `action` (or `ta`) and `done` [n], and `fps`.

`observations` [e, n, h, w, c], with `states` [e, n, s], holds e episodes of n steps.

Takes the chunks of expert play that LAPO publishes (https://github.com/schmidtdominik/LAPO), and grids of
integer features such as XLand's 5x5x2. A file is one stream of steps; `done` at step i ends an episode there.
Unlike in LAPO's own loader, no window ever crosses such an end. Actions of whole numbers are classes, those
of floating-point numbers are continuous.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, Shaped, UInt8

from latentact.data.digest import Memo, blake2b, file_digest
from latentact.data.files import files_below, shown
from latentact.data.format import FORMATS, Episode, discrete_space
from latentact.data.formats.video_folder import has_videos
from latentact.errors import UserError
from latentact.io.arrays import DAMAGED
from latentact.types import ActionSpace

_SMALLEST_IMAGE = 32
_SUFFIXES = (".npz",)
_ACTIONS = ("action", "ta")
_FRAMES = ("obs", "observations")


@FORMATS.register("npz")
class Npz:
    """A `.npz` file, or a folder of them."""

    @staticmethod
    def detect(path: Path) -> bool:
        """Return whether `path` is an npz file, or a folder with some that is no other format's."""
        if path.is_file():
            return path.suffix.lower() in _SUFFIXES
        return (
            not (path / "meta/info.json").exists()
            and not has_videos(path)
            and bool(files_below(path, _SUFFIXES)[0])
        )

    @staticmethod
    def open(path: Path, camera: str, memo: Memo) -> NpzSource:
        """Return the episodes of every file, in the order of their names.

        Raises:
            UserError: a camera is named.
        """
        if camera:
            raise UserError(
                f"{path} is a set of arrays, which has no camera {camera!r}; leave `camera` empty."
            )
        return NpzSource(path, memo)


class NpzSource:
    """The episodes of npz files.

    Args:
        path: a file or a folder.
        memo: remembers what each file holds.
    """

    camera = ""
    uneven = False
    action_names = ()
    tasks = ()

    def __init__(self, path: Path, memo: Memo) -> None:
        """Scan every file."""
        root = path if path.is_dir() else path.parent
        files, self.skipped = files_below(path, _SUFFIXES)
        self.unreadable: dict[str, str] = {}
        self.notes: list[str] = []
        self.episodes: list[Episode] = []
        self.first_rows: list[int] = []
        self._spans: list[tuple[Path, int, int]] = []
        self._files: list[Path] = []
        scans: list[dict[str, Any]] = []
        row = 0
        for file in files:
            name = shown(file.relative_to(root))
            scan: dict[str, Any] = memo.get(file, "npz.3", _scan)
            if "error" not in scan and scans and scan["fps"] != scans[0]["fps"]:
                rates = f"{scan['fps']:g} and the files before it {scans[0]['fps']:g}"
                scan = {"error": f"it has {rates} frames per second; keep rates apart"}
            if "error" in scan:
                self.unreadable[name] = scan["error"]
                continue
            scans.append(scan)
            self._files.append(file)
            for place, (begin, end) in enumerate(scan["spans"]):
                content = blake2b(scan["digest"].encode(), b"%d:%d" % (begin, end))
                label = f"{name} #{place}"
                self.episodes.append(
                    Episode(name=label, file=name, task="", frames=end - begin, content=content)
                )
                self.first_rows.append(row + begin)
                self._spans.append((file, begin, end))
            row += scan["rows"]
        self.resizable = all(scan["image"] for scan in scans)
        self.fps = float(scans[0]["fps"]) if scans else 1.0
        if scans and not all(scan["timed"] for scan in scans):
            self.notes.append("the arrays name no fps: steps count as a second each")
        self.action_space = _space(path, [scan["action"] for scan in scans])
        self._lock = threading.Lock()
        self._obs = functools.lru_cache(maxsize=2)(self._read_obs)

    def frames(self, number: int) -> Iterator[tuple[float, UInt8[np.ndarray, "h w c"]]]:
        """Yield (seconds, observation) of an episode."""
        file, begin, end = self._spans[number]
        with self._lock:
            obs = self._obs(file)
        for step in range(begin, end):
            yield (step - begin) / self.fps, obs[step]

    def column(self, name: str) -> Shaped[np.ndarray, " rows *shape"] | None:
        """Return an array that every file has, over all files."""
        if name == "action":
            return (
                np.concatenate([_action(_load(file)) for file in self._files]) if self.action_space else None
            )
        if name in _FRAMES or not self._files:
            return None
        name = "states" if name == "observation.state" else name
        if not all(name in _load(file) for file in self._files):
            return None
        return np.concatenate([_flat(_load(file), name) for file in self._files])

    def row_tasks(self, number: int) -> Int64[np.ndarray, " n"]:
        """Return -1 for each step: arrays have no task."""
        return np.full(self.episodes[number].frames, -1)

    def _read_obs(self, file: Path) -> UInt8[np.ndarray, "n h w c"]:
        arrays = _load(file)
        return _flat(arrays, _frames(arrays))


def _space(path: Path, actions: list[dict[str, Any] | None]) -> ActionSpace | None:
    """Return the space of the actions of all files; None: some have none."""
    known = [action for action in actions if action is not None]
    if not known or len(known) < len(actions):
        return None
    kinds = {(action["kind"], action.get("size")) for action in known}
    if len(kinds) > 1:
        raise UserError(
            f"the files of {path} must have actions of one kind, got {sorted(map(str, kinds))}; keep "
            f"them apart."
        )
    if known[0]["kind"] == "continuous":
        return ActionSpace(kind="continuous", size=known[0]["size"])
    return discrete_space(np.unique(np.concatenate([np.array(a["values"], np.int64) for a in known])))


def _load(file: Path) -> np.lib.npyio.NpzFile:
    return np.load(file, allow_pickle=False)


def _frames(arrays: np.lib.npyio.NpzFile) -> str:
    return next(name for name in _FRAMES if name in arrays)


def _flat(arrays: np.lib.npyio.NpzFile, name: str) -> Shaped[np.ndarray, " n *shape"]:
    """An array over steps; one over episodes and steps (frames of five axes) loses the first axis."""
    values = arrays[name]
    return values.reshape(-1, *values.shape[2:]) if arrays[_frames(arrays)].ndim == 5 else values


def _action(arrays: np.lib.npyio.NpzFile) -> Shaped[np.ndarray, " n *a"]:
    """Return classes int64 `[n]` or numbers float32 `[n, a]`."""
    values = _flat(arrays, next(name for name in _ACTIONS if name in arrays))
    if values.dtype.kind == "f":
        return values.reshape(len(values), -1).astype(np.float32)
    return values.reshape(-1).astype(np.int64)


def _scan(file: Path) -> dict[str, Any]:
    """Return what a file holds: digest, rows, spans of episodes, actions, rate; or why it is unreadable."""
    try:
        arrays = _load(file)
        if not isinstance(arrays, np.lib.npyio.NpzFile) or not any(name in arrays for name in _FRAMES):
            return {"error": "it has no array `obs`"}
        name = _frames(arrays)
        if arrays[name].ndim not in (4, 5) or arrays[name].dtype != np.uint8 or not arrays[name].size:
            got = f"{arrays[name].dtype} {list(arrays[name].shape)}"
            return {"error": f"`{name}` must be uint8 [n, h, w, c], got {got}"}
        if arrays[name].shape[-3] in (1, 3) and min(arrays[name].shape[-2:]) >= _SMALLEST_IMAGE:
            got = list(arrays[name].shape)
            return {
                "error": f"`{name}` must be [n, h, w, c], got {got}, whose channels come first; transpose it"
            }
        obs, steps = _flat(arrays, name), arrays[name].shape[1] if arrays[name].ndim == 5 else 0
        done = np.arange(1, len(obs) + 1) % steps == 0 if steps else np.zeros(len(obs), bool)
        if "done" in arrays:
            ends = _flat(arrays, "done").reshape(-1)
            if len(ends) != len(obs):
                return {"error": f"`done` must have {len(obs)} flags, one per frame, got {len(ends)}"}
            done = done | ends.astype(bool)
        action = None
        if any(name in arrays for name in _ACTIONS):
            values = _action(arrays)
            if len(values) != len(obs):
                return {"error": f"`action` must have {len(obs)} entries, one per frame, got {len(values)}"}
            if values.ndim > 1:
                action = {"kind": "continuous", "size": values.shape[1]}
            else:
                discrete_space(values)  # refuses too many classes
                action = {"kind": "discrete", "values": np.unique(values).tolist()}
        fps = float(arrays["fps"]) if "fps" in arrays else 1.0
        if not 0 < fps < math.inf:
            return {"error": f"`fps` must be a number above 0, got {fps:g}"}
    except DAMAGED as error:
        return {"error": f"it is not a file of plain arrays ({error})"}
    ends = [int(i) + 1 for i in np.flatnonzero(done)]
    ends += [] if ends and ends[-1] == len(obs) else [len(obs)]
    return {
        "digest": file_digest(file),
        "rows": len(obs),
        "spans": list(zip([0, *ends[:-1]], ends, strict=True)),
        "image": obs.shape[3] in (1, 3) and min(obs.shape[1:3]) >= _SMALLEST_IMAGE,
        "action": action,
        "fps": fps,
        "timed": "fps" in arrays,
    }
