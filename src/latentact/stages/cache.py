"""The cache of decoded frames and LAM tokens: build, list and remove entries.

Example: `latentact cache --data DIR --resolution 64`, `latentact cache`, `latentact cache --clear all`.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import Field

from latentact.data.cache import DataConfig, cache_folder, open_store
from latentact.data.files import printable
from latentact.errors import UserError
from latentact.io.records import Record, read_record

_UNFINISHED, _REMOVED = ".partial", ".removed"


@dataclass(frozen=True, kw_only=True)
class CacheEntry:
    """Decoded frames of a dataset, or their LAM tokens."""

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
    """Whether the entry is complete; the next run resumes an interrupted build."""
    folder: Path
    """Parent folder."""


@dataclass(frozen=True, kw_only=True)
class CacheReport:
    """Content of the cache."""

    folder: Path
    """Folder of the cache."""
    entries: tuple[CacheEntry, ...]
    """Entries, last used first."""
    removed: tuple[CacheEntry, ...] = ()
    """Entries that were removed."""

    @property
    def bytes(self) -> int:
        """Size of all entries on disk."""
        return sum(entry.bytes for entry in self.entries)


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Show, fill or clear the cache."""

    data: DataConfig = field(default_factory=lambda: DataConfig(path=""))
    """Data to decode; empty path: none. Its `cache_dir` is the cache."""
    clear: str = ""
    """Entries to remove: "all", or a key or its prefix; empty: none."""


def run(config: CacheConfig) -> CacheReport:
    """Decode the data, remove the entries to clear, and return the content of the cache.

    Raises:
        UserError: the data cannot be read, `clear` does not match exactly one entry, or that entry is being
            built.
    """
    folder = cache_folder(config.data.cache_dir)
    if config.data.path:
        open_store(config.data, cached=True)
    removed = _to_remove(entries(folder), config.clear, folder) if config.clear else ()
    for entry in removed:
        _remove(entry)
    if config.clear == "all":
        for rest in ("memo", "tokens"):
            shutil.rmtree(folder / rest, ignore_errors=True)
    return CacheReport(folder=folder, entries=entries(folder), removed=removed)


def entries(folder: Path) -> tuple[CacheEntry, ...]:
    """Return the entries of a cache folder, last used first."""
    found = []
    for path in sorted([*folder.glob("*"), *folder.glob("tokens/*")]):
        if path.suffix == _REMOVED:  # a removal was interrupted
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
        dataset=printable(os.fsdecode(used.read_bytes().strip())) if used.is_file() else "",
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
    """`meta.json` of an entry of frames or of LAM tokens."""

    camera: str
    shape: tuple[int, int, int, int] | None = Field(default=None, strict=False)
    spec: _Tokens | None = None
    rows: int | None = None


def _to_remove(found: tuple[CacheEntry, ...], clear: str, folder: Path) -> tuple[CacheEntry, ...]:
    if clear == "all":
        return found
    matching = tuple(entry for entry in found if entry.key.startswith(clear))
    if len(matching) != 1:
        known = ", ".join(entry.key for entry in found) or "none"
        raise UserError(
            f"--clear must match one entry of {folder}, got {clear!r}, which matches {len(matching)}. "
            f"Give `all` or one of: {known}."
        )
    return matching


def _remove(entry: CacheEntry) -> None:
    """Remove an entry atomically."""
    folder = entry.folder
    lock = FileLock(folder / f"{entry.key.partition('.')[0]}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{entry.key} is being built by another process; clear it afterwards.") from error
    path = folder / (entry.key if entry.finished else f"{entry.key}{_UNFINISHED}")
    gone = folder / f"{entry.key}{_REMOVED}"
    path.replace(gone)
    shutil.rmtree(gone)
    lock.release()
    Path(lock.lock_file).unlink(missing_ok=True)
