"""The cache of decoded frames and LAM tokens: build an entry, show what is there, remove what is not needed.

Example: `latentact cache --data DIR --resolution 64`, `latentact cache`, `latentact cache --clear all`.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import Field

from latentact.data.cache import DataConfig, cache_folder, open_store
from latentact.data.files import shown
from latentact.errors import UserError
from latentact.io.records import Record, read_record

_UNFINISHED, _REMOVED = ".partial", ".removed"


@dataclass(frozen=True, kw_only=True)
class CacheEntry:
    """One set of decoded frames, or the LAM tokens of one."""

    key: str
    """Name of its folder."""
    dataset: str
    """Dataset that used it last; empty while it is unfinished."""
    camera: str
    """Camera key; empty for plain video."""
    resolution: str
    """Height x width of frames, k x d of LAM tokens; empty while it is unfinished."""
    frames: int
    """Number of frames; 0 while it is unfinished."""
    bytes: int
    """Size on disk."""
    last_use: float
    """Seconds since 1970."""
    finished: bool
    """False: an interrupted build, which the next one continues."""
    folder: Path
    """Where its folder lies."""


@dataclass(frozen=True, kw_only=True)
class CacheReport:
    """What is in the cache."""

    folder: Path
    """Where it lies."""
    entries: tuple[CacheEntry, ...]
    """What is there, last used first."""
    removed: tuple[CacheEntry, ...] = ()
    """What was there and has been removed."""

    @property
    def bytes(self) -> int:
        """Size of all entries on disk."""
        return sum(entry.bytes for entry in self.entries)


def run(data: DataConfig | None = None, *, clear: str = "", cache_dir: str = "") -> CacheReport:
    """Decode `data` if it is given, then remove what `clear` names, and return what is in the cache.

    Args:
        data: what to decode; its `cache_dir` says where unless that is empty.
        clear: "all", the key of an entry or the beginning of one; empty: remove nothing.
        cache_dir: where the cache lies; empty: $LATENTACT_CACHE, else ~/.cache/latentact.

    Raises:
        UserError: the data cannot be read, or there is not exactly one entry to clear, or it is being built.
    """
    folder = cache_folder((data.cache_dir if data else "") or cache_dir)
    if data is not None:
        open_store(data)
    removed = _chosen(entries(folder), clear, folder) if clear else ()
    for entry in removed:
        _remove(entry)
    if clear == "all":
        for rest in ("memo", "tokens"):
            shutil.rmtree(folder / rest, ignore_errors=True)
    return CacheReport(folder=folder, entries=entries(folder), removed=removed)


def entries(folder: Path) -> tuple[CacheEntry, ...]:
    """Return the entries of a cache folder, last used first."""
    found = []
    for path in sorted([*folder.glob("*"), *folder.glob("tokens/*")]):
        if path.suffix == _REMOVED:  # a clearing was interrupted
            shutil.rmtree(path, ignore_errors=True)
        elif (path / "meta.json").is_file() or path.suffix == _UNFINISHED:
            found.append(_entry(path))
    return tuple(sorted(found, key=lambda entry: -entry.last_use))


def _entry(path: Path) -> CacheEntry:
    used, occupied = path / "used", sum(file.stat().st_size for file in path.iterdir())
    if path.suffix == _UNFINISHED:
        return CacheEntry(
            key=path.stem,
            dataset="",
            camera="",
            resolution="",
            frames=0,
            bytes=occupied,
            last_use=path.stat().st_mtime,
            finished=False,
            folder=path.parent,
        )
    try:
        meta = read_record(_Meta, path / "meta.json")
        frames = meta.shape is not None and "{1}x{2}".format(*meta.shape)
        size = f"{meta.spec.tokens}x{meta.spec.token_dim} LAM tokens" if meta.spec else frames or "damaged"
        rows = (meta.shape or (0,))[0] if meta.rows is None else meta.rows
        camera = meta.camera
    except UserError:
        size, rows, camera = "damaged", 0, ""
    return CacheEntry(
        key=path.name,
        dataset=shown(os.fsdecode(used.read_bytes().strip())) if used.is_file() else "",
        camera=camera,
        resolution=size,
        frames=rows,
        bytes=occupied,
        last_use=(used if used.is_file() else path).stat().st_mtime,
        finished=True,
        folder=path.parent,
    )


class _Tokens(Record):
    tokens: int
    token_dim: int


class _Meta(Record):
    """What `meta.json` of frames, or of LAM tokens, says about its size."""

    camera: str
    shape: tuple[int, int, int, int] | None = Field(default=None, strict=False)
    spec: _Tokens | None = None
    rows: int | None = None


def _chosen(found: tuple[CacheEntry, ...], clear: str, folder: Path) -> tuple[CacheEntry, ...]:
    if clear == "all":
        return found
    fitting = tuple(entry for entry in found if entry.key.startswith(clear))
    if len(fitting) != 1:
        known = ", ".join(entry.key for entry in found) or "none"
        raise UserError(f"{clear!r} fits {len(fitting)} entries of {folder}; give `all` or one of: {known}.")
    return fitting


def _remove(entry: CacheEntry) -> None:
    """Remove an entry at one stroke, so that no half of it is ever found."""
    folder = entry.folder
    lock = FileLock(folder / f"{entry.key.partition('.')[0]}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{entry.key} is being built by another process; clear it after that.") from error
    path = folder / (entry.key if entry.finished else f"{entry.key}{_UNFINISHED}")
    gone = folder / f"{entry.key}{_REMOVED}"
    path.replace(gone)
    shutil.rmtree(gone)
    lock.release()
    Path(lock.lock_file).unlink(missing_ok=True)
