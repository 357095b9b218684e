"""Episodes in npz files: `obs` uint8 [n, h, w, c]; optional `action` (or `ta`) and `done` [n], and `fps`.

`observations` [e, n, h, w, c], with `states` [e, n, s], holds e episodes of n steps.

Takes the chunks of expert play that LAPO publishes (https://github.com/schmidtdominik/LAPO), and grids of
integer features such as XLand's 5x5x2. A file is one stream of steps; `done` at step i ends an episode there.
Unlike in LAPO's own loader, no window ever crosses such an end.
"""

from __future__ import annotations

import functools
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, Shaped, UInt8

from latentact.data.digest import Memo, blake2b, file_digest
from latentact.data.format import FORMATS, Episode
from latentact.data.formats.video_folder import videos
from latentact.errors import UserError
from latentact.types import ActionSpace

_SMALLEST_PICTURE = 32
_ACTIONS = ("action", "ta")
_FRAMES = ("obs", "observations")


@FORMATS.register("npz")
class Npz:
    """A `.npz` file, or a folder of them."""

    @staticmethod
    def detect(path: Path) -> bool:
        """Return whether `path` is an npz file, or a folder with some that is no other format's."""
        return not (path / "meta/info.json").exists() and any(_files(path)) and not any(videos(path))

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

    def __init__(self, path: Path, memo: Memo) -> None:
        """Look at every file."""
        root = path if path.is_dir() else path.parent
        self.unreadable: dict[str, str] = {}
        self.episodes: list[Episode] = []
        self.first_rows: list[int] = []
        self._spans: list[tuple[Path, int, int]] = []
        self._files: list[Path] = []
        looks: list[dict[str, Any]] = []
        row = 0
        for file in sorted(_files(path)):
            name = file.relative_to(root).as_posix()
            look = memo.get(file, "npz", _look)
            if "error" in look:
                self.unreadable[name] = look["error"]
                continue
            looks.append(look)
            self._files.append(file)
            for place, (begin, end) in enumerate(look["spans"]):
                content = blake2b(look["digest"].encode(), b"%d:%d" % (begin, end))
                label = f"{name} #{place}"
                self.episodes.append(
                    Episode(name=label, file=name, task="", frames=end - begin, content=content)
                )
                self.first_rows.append(row + begin)
                self._spans.append((file, begin, end))
            row += look["rows"]
        self.resizable = all(look["picture"] for look in looks)
        self.fps = float(looks[0]["fps"]) if looks else 1.0
        classes = [look["classes"] for look in looks]
        known = bool(classes) and None not in classes
        self.action_space = ActionSpace(kind="discrete", size=max(classes)) if known else None
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
        if name in _FRAMES:
            return None
        name = "states" if name == "observation.state" else name
        if not all(name in _load(file) for file in self._files):
            return None
        return np.concatenate([_flat(_load(file), name) for file in self._files])

    def _read_obs(self, file: Path) -> UInt8[np.ndarray, "n h w c"]:
        arrays = _load(file)
        return _flat(arrays, _frames(arrays))


def _files(path: Path) -> Iterator[Path]:
    candidates = path.rglob("*.npz") if path.is_dir() else [path]
    yield from (file for file in candidates if file.suffix == ".npz" and file.is_file())


def _load(file: Path) -> np.lib.npyio.NpzFile:
    return np.load(file, allow_pickle=False)


def _frames(arrays: np.lib.npyio.NpzFile) -> str:
    return next(name for name in _FRAMES if name in arrays)


def _flat(arrays: np.lib.npyio.NpzFile, name: str) -> Shaped[np.ndarray, " n *shape"]:
    """An array over steps; one over episodes and steps (frames of five axes) loses the first axis."""
    values = arrays[name]
    return values.reshape(-1, *values.shape[2:]) if arrays[_frames(arrays)].ndim == 5 else values


def _action(arrays: np.lib.npyio.NpzFile) -> Int64[np.ndarray, " n"]:
    return _flat(arrays, next(name for name in _ACTIONS if name in arrays)).reshape(-1).astype(np.int64)


def _look(file: Path) -> dict[str, Any]:
    """Return what a file holds: digest, rows, spans of episodes, classes, rate; or why it is unreadable."""
    try:
        arrays = _load(file)
        if not isinstance(arrays, np.lib.npyio.NpzFile) or not any(name in arrays for name in _FRAMES):
            return {"error": "it has no array `obs`"}
        name = _frames(arrays)
        obs, steps = _flat(arrays, name), arrays[name].shape[1] if arrays[name].ndim == 5 else 0
        if obs.dtype != np.uint8 or obs.ndim != 4 or not len(obs):
            return {"error": f"`obs` is {obs.dtype} {list(obs.shape)}, wanted uint8 [n, h, w, c]"}
        done = np.arange(1, len(obs) + 1) % steps == 0 if steps else np.zeros(len(obs), bool)
        if "done" in arrays:
            done = done | _flat(arrays, "done").reshape(-1).astype(bool)
        action = _action(arrays) if any(name in arrays for name in _ACTIONS) else None
        if len(done) != len(obs) or (action is not None and len(action) != len(obs)):
            return {
                "error": f"it has {len(obs)} frames, {len(done)} flags of ends and "
                f"{'no' if action is None else len(action)} actions; wanted one class per frame"
            }
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        return {"error": f"it is not a file of plain arrays ({error})"}
    ends = [int(i) + 1 for i in np.flatnonzero(done)]
    ends += [] if ends and ends[-1] == len(obs) else [len(obs)]
    return {
        "digest": file_digest(file),
        "rows": len(obs),
        "spans": list(zip([0, *ends[:-1]], ends, strict=True)),
        "picture": obs.shape[3] in (1, 3) and min(obs.shape[1:3]) >= _SMALLEST_PICTURE,
        "classes": None if action is None else int(action.max()) + 1,
        "fps": float(arrays["fps"]) if "fps" in arrays else 1.0,
    }
