"""Frames decoded once, at training resolution, shared by every run: `open_store(DataConfig(path=...))`.

An entry's key is made of the bytes that decide its frames (videos, or pictures inside tables), the camera,
the resolution and the rate, so a dataset that is copied, or that gains columns, finds its frames again.
Numeric columns are not in the cache: they are read from the data each time.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from jaxtyping import Float32, Float64, Int64, Shaped, UInt8

from latentact.data.build import build, needed_bytes
from latentact.data.decode.pipeline import DecodeSpec, unreadable_message
from latentact.data.digest import Memo, blake2b
from latentact.data.format import Source, open_source
from latentact.errors import UserError, did_you_mean
from latentact.types import KERNELS, ActionSpace

logger = logging.getLogger(__name__)

_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which frames to use, and how they are decoded."""

    path: str
    """Dataset folder, folder of videos, or one video file."""
    camera: str = ""
    """Camera key; empty: the only one there is."""
    resolution: int = 64
    """Height and width in pixels to which frames are resized; 0: they keep their size, which must be one."""
    resize: str = "uint8"
    """How: uint8 (the fastest), float (as torchvision does to tensors, and villa-X) or pillow (as LAPA)."""
    target_fps: float = 0.0
    """Frames per second to resample to, by timestamps; 0: the data's own."""
    strict: bool = False
    """Whether an unreadable file is an error; otherwise it is skipped by name and counted."""
    cache_dir: str = ""
    """Where decoded frames are kept; empty: $LATENTACT_CACHE, or ~/.cache/latentact."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.resolution < 0 or not 0 <= self.target_fps < math.inf:
            raise UserError(
                f"resolution is {self.resolution}, target_fps is {self.target_fps}; both must be at least 0."
            )
        if self.resize not in KERNELS:
            raise UserError(f"resize is {self.resize!r}{did_you_mean(self.resize, KERNELS)}")


class FrameStore:
    """The frames of a dataset, memory-mapped, with what is known about each.

    A robot action is seen through `actions` only, for the episodes that are named.
    """

    def __init__(self, source: Source, folder: Path, path: Path) -> None:
        """Map the entry at `folder`, which holds the frames of `source`, the dataset at `path`."""
        meta = json.loads((folder / "meta.json").read_text())
        kept = np.load(folder / "episodes.npy")
        episodes = [source.episodes[number] for number in kept]
        self.path = path
        """The dataset."""
        self.folder = folder
        """The cache entry."""
        self.frames: UInt8[np.ndarray, "n h w c"] = np.memmap(
            folder / "frames", dtype=np.uint8, mode="r", shape=tuple(meta["shape"])
        )
        self.lengths: Int64[np.ndarray, " e"] = np.load(folder / "lengths.npy")
        self.starts: Int64[np.ndarray, " e"] = np.cumsum(self.lengths) - self.lengths
        """First row of each episode."""
        self.episode: Int64[np.ndarray, " n"] = np.repeat(np.arange(len(kept)), self.lengths)
        """Episode of each row."""
        self.timestamps: Float64[np.ndarray, " n"] = np.load(folder / "timestamps.npy")
        """Seconds from the episode's first frame."""
        self.source_rows: Int64[np.ndarray, " n"] = np.load(folder / "frame_indices.npy") + np.repeat(
            np.array(source.first_rows, np.int64)[kept], self.lengths
        )
        """Row of the data's tables (LeRobot's `index`) of each row here."""
        self.episode_ids = tuple(episode.name for episode in episodes)
        """Names that a person recognises."""
        self.tasks = tuple(episode.task for episode in episodes)
        """Task text of each episode; empty where there is none."""
        self.fps = float(meta["fps"])
        self.digest = folder.name
        """Content key of the frames."""
        self.camera = source.camera
        """Camera key; empty for plain video."""
        self.action_space: ActionSpace | None = source.action_space
        """What a robot action is; None where the data has none."""
        self.action_names = source.action_names
        """Names of the classes, or of the dimensions; may be empty."""
        self.unreadable: dict[str, str] = {**source.unreadable, **meta["unreadable"]}
        """Files that were skipped: name -> reason."""
        self._source = source

    @property
    def num_episodes(self) -> int:
        """Number of episodes."""
        return len(self.lengths)

    @cached_property
    def state(self) -> Float32[np.ndarray, "n s"] | None:
        """Robot state (`observation.state`) at each row; None where the data has none."""
        state = self.column("observation.state")
        return None if state is None else state.reshape(len(state), -1).astype(np.float32)

    def actions(self, episodes: Collection[int] | np.ndarray) -> Shaped[np.ndarray, " n *a"]:
        """Return the robot actions of the named episodes, all others hidden.

        Returns:
            int64 `[n]`, -1 where hidden, if the action is discrete; else float32 `[n, a]`, NaN where hidden.

        Raises:
            UserError: the data has no actions, or no episode of such a number.
        """
        if self.action_space is None:
            raise UserError(f"{self.path} has no actions; give a dataset with an `action` column.")
        wrong = [e for e in episodes if not 0 <= e < self.num_episodes]
        if wrong:
            raise UserError(
                f"{self.path} has episodes 0 to {self.num_episodes - 1}; there is none numbered {wrong[0]}."
            )
        discrete, size = self.action_space.discrete, self.action_space.size
        rows = len(self.frames)
        hidden = np.full(rows, -1, np.int64) if discrete else np.full((rows, size), np.nan, np.float32)
        shown = np.isin(self.episode, np.array(list(episodes), np.int64))
        if shown.any():
            column = self._source.column("action")
            assert column is not None
            hidden[shown] = column[self.source_rows[shown]].reshape(-1, *hidden.shape[1:])
        return hidden

    def column(self, name: str) -> Shaped[np.ndarray, " n *shape"] | None:
        """Return a numeric column of the data at each row, such as `observation.lam_tokens`; None without it.

        Raises:
            ValueError: an action is asked for; `actions` shows it for the episodes that are named.
        """
        if name.partition(".")[0] == "action":
            raise ValueError(f"{name!r} is seen through `actions` only")
        column = self._source.column(name)
        return None if column is None else column[self.source_rows]


def open_store(config: DataConfig) -> FrameStore:
    """Return the frames that `config` names, decoding them first if no run has done so yet.

    Raises:
        UserError: nothing is there to read, a file is unreadable and `strict` is set, or the disk is full.
    """
    path = Path(config.path).expanduser()
    plan, folder, memo = resolve_source(config)
    if not folder.is_dir():
        _build_once(plan, folder)
    with suppress(
        OSError
    ):  # on a full or read-only disk: the frames are there, and no more is lost than a note
        memo.save()
        _note_use(folder, path)
    store = FrameStore(plan.source, folder, path)
    if store.unreadable and config.strict:
        raise UserError(unreadable_message(store.unreadable))
    if store.unreadable:
        logger.warning("%s: skipped %s", path, unreadable_message(store.unreadable))
    return store


def resolve_source(config: DataConfig) -> tuple[DecodeSpec, Path, Memo]:
    """Return what `config` names, the cache entry that holds its frames once they are decoded, and a memo.

    Raises:
        UserError: nothing is there to read.
    """
    path = Path(config.path).expanduser()
    cache = cache_folder(config.cache_dir)
    memo = Memo(cache / "memo", path)
    source = open_source(path, config.camera, memo)
    if not source.episodes:
        raise UserError(f"{path} holds nothing that can be read: {unreadable_message(source.unreadable)}")
    if config.strict and source.unreadable:
        raise UserError(unreadable_message(source.unreadable))
    if source.uneven and not config.target_fps:
        logger.warning(
            "%s: videos differ in rate; all are resampled to the slowest, %g fps", path, source.fps
        )
    if config.target_fps > 1.01 * source.fps > 0:
        logger.warning("%s has %g fps: at %g fps frames repeat", path, source.fps, config.target_fps)
    fps = config.target_fps or (source.fps if source.uneven else 0.0)
    plan = DecodeSpec(
        source=source,
        fps=fps,
        resolution=config.resolution if source.resizable else 0,
        resize=config.resize,
        strict=config.strict,
    )
    return plan, cache / entry_key(plan), memo


def cache_folder(cache_dir: str = "") -> Path:
    """Return the folder of the cache: `cache_dir`, else $LATENTACT_CACHE, else ~/.cache/latentact."""
    return Path(cache_dir or os.environ.get("LATENTACT_CACHE") or "~/.cache/latentact").expanduser()


def entry_key(plan: DecodeSpec) -> str:
    """Return the key of the entry that holds a plan's frames; the same for equal bytes, wherever they lie."""
    facts = [_VERSION, plan.source.camera, plan.resolution, plan.fps]
    facts += [plan.resize] if plan.resolution and plan.resize != "uint8" else []
    return blake2b(json.dumps([facts, [e.content for e in plan.source.episodes]]).encode())


def _build_once(plan: DecodeSpec, folder: Path) -> None:
    """Build an entry, or wait for the process that is building it."""
    try:
        lock = FileLock(writable(folder.with_name(f"{folder.name}.lock")))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("another process is decoding these frames; waiting for it")
            lock.acquire()
        try:
            if not folder.is_dir():
                build(plan, folder)
        finally:
            lock.release()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{folder.parent} has no room for {needed_bytes(plan)} bytes of frames; free space there, or set "
            f"cache_dir (or LATENTACT_CACHE) to a folder on another disk."
        ) from error


def writable(file: Path) -> Path:
    """Return `file` once it is there; a lock on one that cannot be made would wait for ever."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{file.parent} cannot be written ({error.strerror}); set cache_dir (or LATENTACT_CACHE) to a "
            f"folder of your own."
        ) from error
    return file


def _note_use(folder: Path, path: Path) -> None:
    """Note which dataset used an entry last, and when; `latentact cache` shows it."""
    draft = folder / f"used.{os.getpid()}"
    draft.write_text(f"{path.resolve()}\n")
    draft.replace(folder / "used")
