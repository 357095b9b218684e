"""Frames decoded once, at training resolution, shared by every run: `open_store(DataConfig(path=...))`.

An entry's key is made of everything that decides a byte of its frames or of their times: the bytes of videos
or images, row times, the camera, resolution, rates, and the rules of decoding (`_RULES`). A dataset that is
copied, or that gains columns, finds its frames again. Numeric columns are not in the cache: they are read
from the data each time.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from jaxtyping import Bool, Float32, Float64, Int64, Shaped, UInt8

from latentact.data.build import Entry, build, needed_bytes, read_entry
from latentact.data.decode.pipeline import DecodeSpec, skipped_message, unreadable_message
from latentact.data.digest import Memo, blake2b
from latentact.data.format import Source, open_source
from latentact.data.time_base import valid_transitions
from latentact.errors import UserError, did_you_mean
from latentact.types import KERNELS, ActionSpace

logger = logging.getLogger(__name__)

_RULES = ("2", "pyav", "FFmpeg's colors", "display matrix", "EXIF orientation", "nearest row")
"""Rules by which frames are decoded; another rule is another entry."""
_LARGEST = 4096
_FASTEST = 10_000


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
    drop_nonfinite: bool = False
    """Whether rows whose state or action is missing, NaN or infinite are left out; otherwise they are an
    error."""
    cache_dir: str = ""
    """Where decoded frames are kept; empty: $LATENTACT_CACHE, or ~/.cache/latentact."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not 0 <= self.resolution <= _LARGEST:
            raise UserError(f"resolution must be between 0 and {_LARGEST} pixels, got {self.resolution}.")
        if self.target_fps and not 1 / _FASTEST <= self.target_fps <= _FASTEST:
            raise UserError(
                f"target_fps must be 0 or between {1 / _FASTEST:g} and {_FASTEST} frames per second, got "
                f"{self.target_fps:g}."
            )
        if self.resize not in KERNELS:
            raise UserError(f"unknown resize {self.resize!r}{did_you_mean(self.resize, KERNELS)}")


class FrameStore:
    """The frames of a dataset, memory-mapped, with what is known about each.

    A robot action is seen through `actions` only, for the episodes that are named.
    """

    def __init__(
        self, spec: DecodeSpec, entry: Entry, folder: Path, path: Path, drop_nonfinite: bool = False
    ) -> None:
        """Map the entry at `folder`, which holds the frames that `spec` decodes of the dataset at `path`."""
        source, kept, indices = spec.source, entry.episodes, entry.frame_indices
        episodes = [source.episodes[number] for number in kept]
        self.path = path
        """The dataset."""
        self.folder = folder
        """The cache entry."""
        self.frames: UInt8[np.ndarray, "n h w c"] = np.memmap(
            folder / "frames", dtype=np.uint8, mode="r", shape=entry.shape
        )
        self.lengths: Int64[np.ndarray, " e"] = entry.lengths
        self.starts: Int64[np.ndarray, " e"] = np.cumsum(self.lengths) - self.lengths
        """First row of each episode."""
        self.episode: Int64[np.ndarray, " n"] = np.repeat(np.arange(len(kept)), self.lengths)
        """Episode of each row."""
        self.frame_times: Float64[np.ndarray, " n"] = entry.frame_times
        """Seconds from the episode's first frame at which each frame was taken."""
        within = np.arange(len(self.episode)) - np.repeat(self.starts, self.lengths)
        self.timestamps: Float64[np.ndarray, " n"] = within / spec.fps if spec.fps else self.frame_times
        """Seconds from the episode's first frame that each row stands for; after resampling, of the new
        rate."""
        self.source_rows: Int64[np.ndarray, " n"] = indices + np.repeat(
            np.array(source.first_rows, np.int64)[kept], self.lengths
        )
        """Row of the data's tables (LeRobot's `index`) of each row here."""
        self.episode_ids = tuple(episode.name for episode in episodes)
        """Names that a person recognizes."""
        texts, task = _tasks(source, kept, np.split(indices, np.cumsum(self.lengths)[:-1]))
        self.task_texts: tuple[str, ...] = texts
        """Every task text, once; an empty one for rows without a task."""
        self.task: Int64[np.ndarray, " n"] = task
        """Which of `task_texts` each row belongs to."""
        self.fps = entry.fps
        """Frames per second."""
        self._resampled_from = source.fps if spec.fps else 0.0
        self._drop_nonfinite = drop_nonfinite
        self.digest = folder.name
        """Content key of the frames."""
        self.camera = source.camera
        """Camera key; empty for plain video."""
        self.action_space: ActionSpace | None = source.action_space
        """What a robot action is; None where the data has none."""
        self.action_names = source.action_names
        """Names of the classes, or of the dimensions; may be empty."""
        self.unreadable: dict[str, str] = {**source.unreadable, **entry.unreadable}
        """Files that were skipped: name -> reason."""
        self._source = source

    @property
    def num_episodes(self) -> int:
        """Number of episodes."""
        return len(self.lengths)

    @property
    def num_frames(self) -> int:
        """Number of frames."""
        return len(self.frames)

    @cached_property
    def usable(self) -> Bool[np.ndarray, " n"]:
        """Rows to use: all, or with `drop_nonfinite` those whose state and action are finite numbers."""
        return (
            usable_rows(self._source)[self.source_rows]
            if self._drop_nonfinite
            else np.ones(self.num_frames, bool)
        )

    def transitions(self, gap: int) -> Bool[np.ndarray, " n"]:
        """Return from which rows a transition of `gap` frames starts, near enough in time.

        Args:
            gap: frames, at least 1.
        """
        valid = valid_transitions(self.frame_times, self.episode, gap, self.fps, self._resampled_from)
        valid[:-gap] &= self.usable[:-gap] & self.usable[gap:]
        return valid

    @cached_property
    def state(self) -> Float32[np.ndarray, "n s"] | None:
        """Robot state (`observation.state`) at each row; None where the data has none.

        Raises:
            UserError: a number is missing, NaN or infinite; with `drop_nonfinite` such rows are zeros, which
                no window and no target uses.
        """
        state = self.column("observation.state")
        return None if state is None else state.reshape(len(state), -1).astype(np.float32)

    def actions(self, episodes: Collection[int] | np.ndarray) -> np.ma.MaskedArray:
        """Return the robot actions of the named episodes, all others hidden.

        Returns:
            int64 `[n]` if the action is discrete, else float32 `[n, a]`; masked where hidden. An episode's
            last action, which is never taken, is hidden too where it is not a finite number.

        Raises:
            UserError: the data has no actions, or no episode of such a number; or an action that is shown is
                missing, NaN or infinite, without `drop_nonfinite`.
        """
        if self.action_space is None:
            raise UserError(f"{self.path} has no actions; give a dataset with an `action` column.")
        wrong = [e for e in episodes if not 0 <= e < self.num_episodes]
        if wrong:
            raise UserError(
                f"{self.path} has episodes 0 to {self.num_episodes - 1}; there is none numbered {wrong[0]}."
            )
        discrete, rows = self.action_space.discrete, len(self.frames)
        actions = (
            np.zeros(rows, np.int64) if discrete else np.zeros((rows, self.action_space.size), np.float32)
        )
        shown = np.isin(self.episode, np.array(list(episodes), np.int64))
        if shown.any():
            column = self._source.column("action")
            assert column is not None
            values = column.reshape(len(column), -1)[self.source_rows]
            taken = np.ones(rows, bool)
            taken[self.starts + self.lengths - 1] = (
                False  # an episode's last action; many recorders leave it out
            )
            shown &= self.usable & (taken | np.isfinite(values).all(1))
            values = self._finite(values, "action", shown)[shown].reshape(-1, *actions.shape[1:])
            actions[shown] = self._classes(values) if discrete else values
        hidden = np.broadcast_to(~shown if discrete else ~shown[:, None], actions.shape)
        return np.ma.MaskedArray(actions, mask=hidden)

    def column(self, name: str) -> Shaped[np.ndarray, " n *shape"] | None:
        """Return a numeric column of the data at each row, such as `observation.lam_tokens`; None without it.

        Raises:
            ValueError: an action is asked for; `actions` shows it for the episodes that are named.
            UserError: a number is missing, NaN or infinite; with `drop_nonfinite` such rows are zeros.
        """
        if name.partition(".")[0] == "action":
            raise ValueError(f"{name!r} is seen through `actions` only")
        column = self._source.column(name)
        if column is None:
            return None
        values = column[self.source_rows]
        flat = values.reshape(len(values), -1)
        return self._finite(flat, name, np.ones(len(flat), bool)).reshape(values.shape)

    def _classes(self, values: np.ndarray) -> Int64[np.ndarray, " m"]:
        """Return the class of each raw value of a discrete action."""
        assert self.action_space is not None
        whole = values.astype(np.int64)
        return np.searchsorted(self.action_space.values, whole) if self.action_space.values else whole

    def _finite(self, values: np.ndarray, name: str, looked_at: np.ndarray) -> np.ndarray:
        def row(number: int) -> str:
            episode = int(self.episode[number])
            return f"row {number - int(self.starts[episode])} of {self.episode_ids[episode]}"

        return finite(values, looked_at, self._drop_nonfinite, f"{self.path}, column {name}", row)


def known_rows(actions: np.ndarray) -> Bool[np.ndarray, " n"]:
    """Return in which rows of `FrameStore.actions` an action is shown."""
    return ~np.ma.getmaskarray(actions).reshape(len(actions), -1).any(1)


def usable_rows(source: Source) -> Bool[np.ndarray, " rows"]:
    """Return which rows of the data's tables hold a finite state and action, as far as there are any."""
    rows = [first + e.frames for first, e in zip(source.first_rows, source.episodes, strict=True)]
    usable = np.ones(max(rows, default=0), bool)
    for name in ("observation.state", "action"):
        column = source.column(name)
        if column is not None:
            usable &= np.all(np.isfinite(column.reshape(len(column), -1)), axis=1)[: len(usable)]
    return usable


def finite(
    values: Shaped[np.ndarray, "n d"],
    looked_at: Bool[np.ndarray, " n"],
    drop: bool,
    where: str,
    row: Callable[[int], str],
) -> Shaped[np.ndarray, "n d"]:
    """Return numbers that are finite wherever they are looked at.

    Args:
        values: what the data holds.
        looked_at: rows that matter.
        drop: whether rows with other numbers become zeros, because nothing uses them.
        where: what messages call the column.
        row: what they call a row.

    Raises:
        UserError: a number is missing, NaN or infinite, and they are not dropped.
    """
    wrong = ~np.isfinite(values).all(1) & looked_at
    if not wrong.any():
        return values
    if not drop:
        raise UserError(
            f"{where}: {int(wrong.sum())} rows are missing, NaN or infinite, the first is "
            f"{row(int(wrong.argmax()))}; repair the data, or leave such rows out with --drop-nonfinite "
            f"(data.drop_nonfinite=true)."
        )
    return np.where(wrong[:, None], np.zeros((), values.dtype), values)


def _tasks(
    source: Source, kept: np.ndarray, rows: Sequence[np.ndarray]
) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the tasks that occur, and which of them each row has, of the kept episodes' rows."""
    pairs = [(source.row_tasks(int(number)), part) for number, part in zip(kept, rows, strict=True)]
    found = np.concatenate([tasks[np.minimum(part, len(tasks) - 1)] for tasks, part in pairs])
    used, task = np.unique(found, return_inverse=True)
    return tuple("" if n < 0 else source.tasks[int(n)] for n in used), task


def open_store(config: DataConfig) -> FrameStore:
    """Return the frames that `config` names, decoding them first if no run has done so yet.

    Raises:
        UserError: nothing is there to read, a file is unreadable and `strict` is set, or the disk is full.
    """
    path = Path(config.path).expanduser()
    spec, folder, memo = resolve_source(config)
    entry = read_entry(folder) or _build_once(spec, folder)
    with suppress(
        OSError
    ):  # on a full or read-only disk: the frames are there, and no more is lost than a note
        memo.save()
        _note_use(folder, path)
    store = FrameStore(spec, entry, folder, path, config.drop_nonfinite)
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
        raise UserError(
            f"{path} holds nothing that can be read: "
            f"{unreadable_message({**source.unreadable, **source.skipped})}"
        )
    if config.strict and source.unreadable:
        raise UserError(unreadable_message(source.unreadable))
    for note in source.notes:
        logger.warning("%s: %s", path, note)
    if source.skipped:
        logger.info("%s: left out %s", path, skipped_message(source.skipped))
    if source.uneven and not config.target_fps:
        logger.warning("%s: frame rates vary; frames are resampled by time to %g fps", path, source.fps)
    if config.target_fps > 1.01 * source.fps > 0:
        logger.warning("%s has %g fps: at %g fps frames repeat", path, source.fps, config.target_fps)
    fps = config.target_fps or (source.fps if source.uneven else 0.0)
    spec = DecodeSpec(
        source=source,
        fps=fps,
        resolution=config.resolution if source.resizable else 0,
        resize=config.resize,
        strict=config.strict,
    )
    return spec, cache / entry_key(spec), memo


def cache_folder(cache_dir: str = "") -> Path:
    """Return the folder of the cache: `cache_dir`, else $LATENTACT_CACHE, else ~/.cache/latentact."""
    return Path(cache_dir or os.environ.get("LATENTACT_CACHE") or "~/.cache/latentact").expanduser()


def entry_key(spec: DecodeSpec) -> str:
    """Return the key of the entry that holds a spec's frames; the same for equal bytes, wherever they lie."""
    facts = [*_RULES, spec.source.camera, spec.resolution, spec.resize, spec.fps, spec.source.fps]
    return blake2b(json.dumps([facts, [e.content for e in spec.source.episodes]]).encode())


def _build_once(spec: DecodeSpec, folder: Path) -> Entry:
    """Build an entry, or wait for the process that is building it; a damaged one makes way."""
    try:
        lock = FileLock(writable(folder.with_name(f"{folder.name}.lock")))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("another process is decoding these frames; waiting for it")
            lock.acquire()
        try:
            if (entry := read_entry(folder)) is None:
                shutil.rmtree(folder, ignore_errors=True)
                build(spec, folder)
                entry = read_entry(folder)
        finally:
            lock.release()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{folder.parent} has no room for {needed_bytes(spec)} bytes of frames; free space there, or set "
            f"cache_dir (or LATENTACT_CACHE) to a folder on another disk."
        ) from error
    if entry is None:
        raise UserError(
            f"{folder} does not keep what is written to it; set cache_dir to a folder on another disk."
        )
    return entry


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
    draft.write_bytes(os.fsencode(path.resolve()) + b"\n")
    draft.replace(folder / "used")
