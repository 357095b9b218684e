"""Cache of decoded frames at training resolution, shared by all runs: `open_store(DataConfig(path=...))`.

The key of a cache entry covers everything that affects its frames and timestamps: the content of videos or
images, row timestamps, camera, resolution, rates and the decoding rules (`_RULES`). A dataset that is copied
or gains columns therefore reuses its entry. Numeric columns are not cached; they are read from the dataset.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from filelock import FileLock, Timeout

from latentact.config import OneOf, Pixels, Rate
from latentact.data.access import Frames, IndexedFrames, index_entry
from latentact.data.build import Entry, build, needed_bytes, read_entry
from latentact.data.decode.pipeline import DecodeSpec, skipped_message, unreadable_message
from latentact.data.digest import Memo, blake2b
from latentact.data.format import open_source
from latentact.data.locate import resolve_dataset
from latentact.data.store import FrameStore
from latentact.data.time_base import rates_agree
from latentact.errors import UserError, require_one_of
from latentact.types import KERNELS

logger = logging.getLogger(__name__)

_RULES = ("2", "pyav", "FFmpeg's colors", "display matrix", "EXIF orientation", "nearest row")
"""Decoding rules; part of the key, so that a changed rule makes a new entry."""
_MAX_RESOLUTION = 4096
_MAX_FPS = 10_000


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which frames to load and how to decode them."""

    path: str
    """Dataset folder, folder of videos, shards, one video file, or hub id: `owner/name`,
    `owner/name@revision`."""
    camera: str = ""
    """Camera key; empty: the only camera of the dataset."""
    resolution: Pixels = 64
    """Height and width in pixels to which frames are resized; 0: keep the size, which must be the same for
    all frames."""
    resize: Annotated[str, OneOf(KERNELS)] = "uint8"
    """Resize method: uint8 (the fastest), float (as torchvision resizes tensors, and villa-X) or pillow (as
    LAPA)."""
    fps: Rate = 0.0
    """Frames per second of data that states none, such as arrays or shards of other programs; 0: 1, or the
    slowest rate that the rest of the data states."""
    target_fps: Rate = 0.0
    """Frames per second to resample to, by timestamps; 0: the rate of the dataset."""
    strict: bool = False
    """Raise an error for unreadable files instead of skipping them with a warning."""
    no_strict: bool = False
    """Skip truncated, altered and missing shards, too, instead of raising an error."""
    drop_nonfinite: bool = False
    """Drop rows whose state or action is missing, NaN or infinite instead of raising an error."""
    cache_dir: str = ""
    """Folder of decoded frames; empty: $LATENTACT_CACHE, or ~/.cache/latentact."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        if not 0 <= self.resolution <= _MAX_RESOLUTION:
            raise UserError(
                f"resolution must be between 0 and {_MAX_RESOLUTION} pixels, got {self.resolution}."
            )
        for name in ("fps", "target_fps"):
            if (rate := getattr(self, name)) and not 1 / _MAX_FPS <= rate <= _MAX_FPS:
                raise UserError(
                    f"{name} must be 0 or between {1 / _MAX_FPS:g} and {_MAX_FPS} frames per second, got "
                    f"{rate:g}."
                )
        require_one_of("resize", self.resize, KERNELS)


def open_store(config: DataConfig, *, cached: bool = False) -> FrameStore:
    """Return the frames of a dataset.

    Frames are decoded into the cache first if they are not cached yet, unless they can be read in any order,
    as in shards of images: these are decoded when they are used.

    Args:
        config: dataset and decoding settings.
        cached: decode the frames of every dataset into the cache.

    Raises:
        UserError: the dataset is missing or has no readable episode, a file is unreadable and `strict` is
            set, or the disk is full.
    """
    path = resolve_dataset(config.path)
    spec, folder, memo = resolve_source(config)
    entry = read_entry(folder)
    if entry is None and not cached and spec.source.random_access:
        entry = index_entry(spec)
        frames: Frames = IndexedFrames(spec, entry)
        with suppress(OSError):
            memo.save()
    else:
        entry = entry or _build_once(spec, folder)
        frames = np.memmap(folder / "frames", dtype=np.uint8, mode="r", shape=entry.shape)
        with suppress(OSError):  # full or read-only disk: the frames are complete, only bookkeeping is lost
            memo.save()
            _note_use(folder, path)
    store = FrameStore(spec, entry, folder, path, frames, config.drop_nonfinite)
    if entry.unreadable and config.strict:
        raise UserError(unreadable_message(entry.unreadable))
    if entry.unreadable:
        logger.warning("%s: skipped %s", path, unreadable_message(entry.unreadable))
    return store


def resolve_source(config: DataConfig) -> tuple[DecodeSpec, Path, Memo]:
    """Open the dataset of a config without decoding frames.

    Returns:
        The decoding settings, the folder of the cache entry (which need not exist yet), and the memo.

    Raises:
        UserError: the dataset is missing or has no readable episode.
    """
    path = resolve_dataset(config.path)
    cache = cache_folder(config.cache_dir)
    memo = Memo(cache / "memo", path)
    source = open_source(path, config.camera, memo)
    if config.fps and source.untimed:
        source.set_fps(config.fps)
    elif config.fps and source.episodes and not rates_agree(config.fps, source.fps):
        raise UserError(
            f"data.fps must be 0 for {path}, which states {source.fps:g} frames per second itself, got "
            f"{config.fps:g}. Use data.target_fps to resample."
        )
    if not source.episodes:
        raise UserError(
            f"{path} has no readable episode: {unreadable_message({**source.unreadable, **source.skipped})}"
        )
    damaged = {} if config.no_strict else source.damaged
    if refused := (source.unreadable if config.strict else damaged):
        raise UserError(unreadable_message(refused, "--no-strict skips damaged shards" if damaged else ""))
    for note in source.notes:
        logger.warning("%s: %s", path, note)
    if source.unreadable:
        logger.warning("%s: skipped %s", path, unreadable_message(source.unreadable))
    if source.skipped:
        logger.info("%s: skipped %s", path, skipped_message(source.skipped))
    if source.uneven and not config.target_fps:
        logger.warning("%s: frame rates vary; resampling to %g fps", path, source.fps)
    if config.target_fps > source.fps > 0 and not rates_agree(config.target_fps, source.fps):
        logger.warning(
            "%s has %g fps: frames are repeated to reach %g fps", path, source.fps, config.target_fps
        )
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
    """Return the cache folder: `cache_dir`, else $LATENTACT_CACHE, else ~/.cache/latentact."""
    return Path(cache_dir or os.environ.get("LATENTACT_CACHE") or "~/.cache/latentact").expanduser()


def entry_key(spec: DecodeSpec) -> str:
    """Return the key of the cache entry of a spec; independent of the path of the dataset."""
    facts = [*_RULES, spec.source.camera, spec.resolution, spec.resize, spec.fps, spec.source.fps]
    return blake2b(json.dumps([facts, [e.content for e in spec.source.episodes]]).encode())


def _build_once(spec: DecodeSpec, folder: Path) -> Entry:
    """Build an entry, or wait for another process that is building it; replace a damaged entry."""
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
            f"{folder.parent} must have {needed_bytes(spec)} bytes of free space for frames; free some "
            f"space, or set cache_dir (or LATENTACT_CACHE) to a folder on another disk."
        ) from error
    if entry is None:
        raise UserError(
            f"{folder} cannot be read back after writing; set cache_dir to a folder on another disk."
        )
    return entry


def writable(file: Path) -> Path:
    """Create a file and return it; a lock on a file that cannot be created would block forever."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{file.parent} is not writable ({error.strerror}); set cache_dir (or LATENTACT_CACHE) to a "
            f"writable folder."
        ) from error
    return file


def _note_use(folder: Path, path: Path) -> None:
    """Record the dataset and the time of the last use of an entry, which `latentact cache` shows."""
    draft = folder / f"used.{os.getpid()}"
    draft.write_bytes(os.fsencode(path.resolve()) + b"\n")
    draft.replace(folder / "used")
