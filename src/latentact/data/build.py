"""Build one cache entry: decode every episode once, in order; an interrupted build resumes.

An unfinished entry is a folder `<key>.partial` with the frames written so far and a journal of complete
episodes; a complete entry is renamed to `<key>`. The frames of an episode are flushed to disk before its
journal line.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float64, Int64
from pydantic import Field, model_validator

from latentact.data.decode.pipeline import DecodeSpec, decoded, require_shape, unreadable_message
from latentact.data.digest import blake2b
from latentact.data.format import Unreadable
from latentact.errors import UserError
from latentact.io.records import Record, parse_json, parse_record, read_record
from latentact.progress import Progress

logger = logging.getLogger(__name__)

_COMMIT_S = 0.25
_ARRAYS = ("episodes", "lengths", "frame_times", "frame_indices")


@dataclass
class Journal:
    """Complete episodes of a partial entry."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    """One per complete episode, in order: {"times", "frame_indices", "shape"}, or {"unreadable": reason}."""

    @property
    def frames(self) -> int:
        """Number of frames of the complete episodes."""
        return sum(len(line.get("times", ())) for line in self.lines)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """(h, w, c) of every frame; None before the first frame."""
        return next((tuple(line["shape"]) for line in self.lines if "shape" in line), None)


class _EpisodeLine(Record):
    """One line of the journal."""

    times: tuple[float, ...] | None = Field(default=None, strict=False)
    frame_indices: tuple[int, ...] | None = Field(default=None, strict=False)
    shape: tuple[int, int, int] | None = Field(default=None, strict=False)
    unreadable: str | None = None

    @model_validator(mode="after")
    def _check(self) -> _EpisodeLine:
        read = None not in (self.times, self.frame_indices, self.shape)
        if read == (self.unreadable is not None) or len(self.times or ()) != len(self.frame_indices or ()):
            raise ValueError("the frames of an episode, or the reason why it is unreadable")
        return self


def build(spec: DecodeSpec, folder: Path) -> None:
    """Build the cache entry `folder`; resume from `<folder>.partial` if an earlier build was interrupted.

    Raises:
        UserError: no episode is readable, an episode is unreadable and the spec is strict, or frame sizes
            differ and the resolution is 0. The partial entry is removed.
        OSError: the disk is full; the partial entry is kept, and the next build resumes.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        _require_room(spec, partial)
        partial.mkdir(exist_ok=True)
        with (partial / "journal.jsonl").open("a+b") as log, (partial / "frames").open("a+b") as frames:
            journal = _resume(log, frames)
            _append(spec, journal, log, frames)
        _finish(spec, journal, partial, folder)
    except UserError:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _resume(log: BinaryIO, frames: BinaryIO) -> Journal:
    """Read the journal and truncate both files after the last complete episode."""
    log.seek(0)
    journal, end = Journal(), 0
    for line in log:
        try:
            parsed = parse_record(_EpisodeLine, parse_json(line.decode(), "journal"), "journal")
        except (UserError, UnicodeDecodeError):
            break
        if not line.endswith(b"\n"):
            break
        journal.lines.append(parsed.model_dump(exclude_none=True))
        end += len(line)
    complete_bytes = journal.frames * int(np.prod(journal.shape or (0,)))
    if frames.seek(0, os.SEEK_END) < complete_bytes:
        journal, end, complete_bytes = Journal(), 0, 0
    log.truncate(end)
    frames.truncate(complete_bytes)
    if journal.lines:
        logger.info("resuming an interrupted build at episode %d", len(journal.lines))
    return journal


def _append(spec: DecodeSpec, journal: Journal, log: BinaryIO, frames: BinaryIO) -> None:
    """Decode the episodes that are not in the journal."""
    todo = range(len(journal.lines), len(spec.source.episodes))
    shape, pending, last_commit = journal.shape, [], time.monotonic()
    with (
        Progress("decoding", _expected_frames(spec), "frames", done=journal.frames) as progress,
        closing(decoded(spec, todo)) as episodes,
    ):
        for number, chunks in episodes:
            label, begin = spec.source.episodes[number].label, frames.seek(0, os.SEEK_END)
            line: dict[str, Any] = {"times": [], "frame_indices": []}
            try:
                for chunk in chunks:
                    shape = shape or chunk.frames.shape[1:]
                    require_shape(spec, shape, chunk.frames.shape[1:], label)
                    frames.write(chunk.frames.data)
                    line["times"] += chunk.times
                    line["frame_indices"] += chunk.frame_indices
                    progress.advance(len(chunk.times))
                line |= {"shape": shape} if line["times"] else {"unreadable": "it has no frames"}
            except Unreadable as error:
                frames.truncate(begin)
                line = {"unreadable": str(error)}
            if spec.strict and "unreadable" in line:
                raise UserError(unreadable_message({label: line["unreadable"]}))
            pending.append(line)
            if time.monotonic() - last_commit > _COMMIT_S:
                _commit(journal, pending, log, frames)
                last_commit = time.monotonic()
    _commit(journal, pending, log, frames)


def _commit(journal: Journal, pending: list[dict[str, Any]], log: BinaryIO, frames: BinaryIO) -> None:
    _sync(frames)
    log.write(b"".join(json.dumps(line).encode() + b"\n" for line in pending))
    _sync(log)
    journal.lines += pending
    pending.clear()


def _finish(spec: DecodeSpec, journal: Journal, partial: Path, folder: Path) -> None:
    """Convert a partial entry with all episodes to a complete entry."""
    episodes = spec.source.episodes
    unreadable = {
        episodes[number].label: line["unreadable"]
        for number, line in enumerate(journal.lines)
        if "unreadable" in line
    }
    kept = [number for number, line in enumerate(journal.lines) if "unreadable" not in line]
    if journal.shape is None:
        raise UserError(
            f"the data has no readable frames: {unreadable_message({**spec.source.unreadable, **unreadable})}"
        )
    lines = [journal.lines[number] for number in kept]
    arrays = {
        "episodes": np.array(kept, np.int64),
        "lengths": np.array([len(line["times"]) for line in lines], np.int64),
        "frame_times": np.concatenate([np.array(line["times"], np.float64) for line in lines]),
        "frame_indices": np.concatenate([np.array(line["frame_indices"], np.int64) for line in lines]),
    }
    for name, array in arrays.items():
        with (partial / f"{name}.npy").open("wb") as file:
            np.save(file, array)
            _sync(file)
    meta: dict[str, Any] = {
        "shape": [journal.frames, *journal.shape],
        "fps": float(spec.fps or spec.source.fps),
        "camera": spec.source.camera,
        "unreadable": unreadable,
    }
    meta["digest"] = _digest(meta, [(partial / f"{name}.npy").read_bytes() for name in _ARRAYS])
    with (partial / "meta.json").open("wb") as file:
        file.write(json.dumps(meta, indent=1).encode())
        _sync(file)
    partial.replace(folder)
    (folder / "journal.jsonl").unlink()
    descriptor = os.open(folder.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


class _EntryRecord(Record):
    """Content of `meta.json`."""

    shape: tuple[int, int, int, int] = Field(strict=False)
    fps: float
    camera: str
    unreadable: dict[str, str]
    digest: str


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Contents of a complete entry, except the pixels."""

    shape: tuple[int, int, int, int]
    """Shape (n, h, w, c) of the frames."""
    fps: float
    """Frames per second."""
    unreadable: dict[str, str]
    """Skipped episodes: name -> reason."""
    episodes: Int64[np.ndarray, " e"]
    """Index of each episode in `Source.episodes`."""
    lengths: Int64[np.ndarray, " e"]
    """Number of frames of each episode."""
    frame_times: Float64[np.ndarray, " n"]
    """Time of each frame in seconds since the first frame of its episode."""
    frame_indices: Int64[np.ndarray, " n"]
    """Index of each frame in its episode before resampling."""


def read_entry(folder: Path) -> Entry | None:
    """Return the contents of the cache entry at `folder`; None if it is missing or damaged."""
    if not folder.is_dir():
        return None
    try:
        meta = read_record(_EntryRecord, folder / "meta.json")
        data = [(folder / f"{name}.npy").read_bytes() for name in _ARRAYS]
        intact = meta.digest == _digest(meta.model_dump(exclude={"digest"}), data)
        if intact and (folder / "frames").stat().st_size == math.prod(meta.shape):
            arrays: Any = {n: np.load(io.BytesIO(d)) for n, d in zip(_ARRAYS, data, strict=True)}
            return Entry(shape=meta.shape, fps=meta.fps, unreadable=meta.unreadable, **arrays)
    except (UserError, OSError) as error:
        logger.debug("%s", error)
    logger.warning("the cache entry %s is damaged: decoding its frames again", folder.name)
    return None


def _digest(meta: Mapping[str, Any], arrays: Sequence[bytes]) -> str:
    return blake2b(json.dumps(meta, sort_keys=True).encode(), *arrays)


def _expected_frames(spec: DecodeSpec) -> int:
    """Return the number of frames of the complete entry; an estimate if frames are resampled."""
    ratio = spec.fps / spec.source.fps if spec.fps and spec.source.fps else 1.0
    return sum(max(1, round(episode.frames * ratio)) for episode in spec.source.episodes)


def needed_bytes(spec: DecodeSpec) -> int:
    """Return the size of the complete entry in bytes; 0 if no frame can be decoded.

    The size is an estimate if frames are resampled.
    """
    for number in range(len(spec.source.episodes)):
        with suppress(Unreadable):
            for _, frame in spec.source.frames(number):
                size = spec.resolution**2 * frame.shape[-1] if spec.resolution else frame.size
                return size * _expected_frames(spec)
    return 0


def _require_room(spec: DecodeSpec, partial: Path) -> None:
    written = (partial / "frames").stat().st_size if (partial / "frames").exists() else 0
    if shutil.disk_usage(partial.parent).free < needed_bytes(spec) - written:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(partial.parent))


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
