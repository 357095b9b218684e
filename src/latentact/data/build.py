"""Builds one cache entry: decodes every episode once, in order; a killed build goes on where it stopped.

An entry under construction is a folder `<key>.partial` with the frames so far and a journal of complete
episodes. Only a whole entry bears the name `<key>`. Frames reach the disk before the journal line that
vouches for them.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from queue import Full, Queue
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import UInt8

from latentact.data.format import Source, Unreadable
from latentact.data.progress import Progress
from latentact.data.resize import resize
from latentact.data.video import at_times
from latentact.errors import UserError

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 4 << 20
_CHUNKS_AHEAD = 8
_COMMIT_S = 0.25


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one entry holds."""

    source: Source
    fps: float
    """Rate to resample to; 0: every frame as it is."""
    resolution: int
    """0: frames keep their size."""
    resize: str
    """How they change it."""
    strict: bool
    """Whether a damaged episode ends the build."""


@dataclass(frozen=True)
class Chunk:
    """Some consecutive frames of one episode."""

    frames: UInt8[np.ndarray, "n h w c"]
    times: list[float]
    """Seconds from the episode's first frame."""
    picks: list[int]
    """Number of each frame among the episode's frames before resampling."""


@dataclass
class Journal:
    """What a partial entry holds for certain."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    """One per finished episode, in order: {"times", "picks", "shape"}, or {"unreadable": reason}."""

    @property
    def frames(self) -> int:
        """Frames of the finished episodes."""
        return sum(len(line.get("times", ())) for line in self.lines)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """(h, w, c) of every frame; None while there is none."""
        return next((tuple(line["shape"]) for line in self.lines if "shape" in line), None)


def build(plan: Plan, folder: Path) -> None:
    """Make the cache entry `folder`, going on from what an earlier build left in `<folder>.partial`.

    Raises:
        UserError: nothing is readable; something is not and the plan is strict; or sizes differ and the
            resolution is 0. Nothing is left behind.
        OSError: the disk is full; what was decoded is kept for the next build.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        _require_room(plan, partial)
        partial.mkdir(exist_ok=True)
        with (partial / "journal.jsonl").open("a+b") as log, (partial / "frames").open("a+b") as frames:
            journal = _resume(log, frames)
            _append(plan, journal, log, frames)
        _finish(plan, journal, partial, folder)
    except UserError:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _resume(log: BinaryIO, frames: BinaryIO) -> Journal:
    """Read the journal, and cut off whatever lies after the last episode that it vouches for."""
    log.seek(0)
    journal, end = Journal(), 0
    for line in log:
        if not line.endswith(b"\n"):
            break
        journal.lines.append(json.loads(line))
        end += len(line)
    vouched = journal.frames * int(np.prod(journal.shape or (0,)))
    if frames.seek(0, os.SEEK_END) < vouched:
        journal, end, vouched = Journal(), 0, 0
    log.truncate(end)
    frames.truncate(vouched)
    if journal.lines:
        logger.info("going on from episode %d of an interrupted build", len(journal.lines))
    return journal


def _append(plan: Plan, journal: Journal, log: BinaryIO, frames: BinaryIO) -> None:
    """Decode what the journal lacks."""
    todo = range(len(journal.lines), len(plan.source.episodes))
    shape, waiting, committed = journal.shape, [], time.monotonic()
    with (
        Progress("decoding", _expected_frames(plan), "frames", done=journal.frames) as progress,
        closing(decoded(plan, todo)) as episodes,
    ):
        for number, chunks in episodes:
            label, begin = plan.source.episodes[number].label, frames.seek(0, os.SEEK_END)
            line: dict[str, Any] = {"times": [], "picks": []}
            try:
                for chunk in chunks:
                    shape = shape or chunk.frames.shape[1:]
                    require_shape(plan, shape, chunk.frames.shape[1:], label)
                    frames.write(chunk.frames.data)
                    line["times"] += chunk.times
                    line["picks"] += chunk.picks
                    progress.advance(len(chunk.times))
                line |= {"shape": shape} if line["times"] else {"unreadable": "it has no frames"}
            except Unreadable as error:
                frames.truncate(begin)
                line = {"unreadable": str(error)}
            if plan.strict and "unreadable" in line:
                raise UserError(unreadable_message({label: line["unreadable"]}))
            waiting.append(line)
            if time.monotonic() - committed > _COMMIT_S:
                _commit(journal, waiting, log, frames)
                committed = time.monotonic()
    _commit(journal, waiting, log, frames)


def _commit(journal: Journal, waiting: list[dict[str, Any]], log: BinaryIO, frames: BinaryIO) -> None:
    _sync(frames)
    log.write(b"".join(json.dumps(line).encode() + b"\n" for line in waiting))
    _sync(log)
    journal.lines += waiting
    waiting.clear()


def _finish(plan: Plan, journal: Journal, partial: Path, folder: Path) -> None:
    """Turn a partial entry whose episodes are all there into a whole one."""
    episodes = plan.source.episodes
    broken = {
        episodes[number].label: line["unreadable"]
        for number, line in enumerate(journal.lines)
        if "unreadable" in line
    }
    kept = [number for number, line in enumerate(journal.lines) if "unreadable" not in line]
    if journal.shape is None:
        raise UserError(
            f"nothing is left to read: {unreadable_message({**plan.source.unreadable, **broken})}"
        )
    lines = [journal.lines[number] for number in kept]
    arrays = {
        "episodes": np.array(kept, np.int64),
        "lengths": np.array([len(line["times"]) for line in lines], np.int64),
        "timestamps": np.concatenate([np.array(line["times"], np.float64) for line in lines]),
        "picks": np.concatenate([np.array(line["picks"], np.int64) for line in lines]),
    }
    for name, array in arrays.items():
        with (partial / f"{name}.npy").open("wb") as file:
            np.save(file, array)
            _sync(file)
    meta = {
        "shape": [journal.frames, *journal.shape],
        "fps": plan.fps or plan.source.fps,
        "camera": plan.source.camera,
        "unreadable": broken,
    }
    with (partial / "meta.json").open("wb") as file:
        file.write(json.dumps(meta, indent=1).encode())
        _sync(file)
    partial.replace(folder)
    (folder / "journal.jsonl").unlink()
    descriptor = os.open(folder.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def unreadable_message(files: Mapping[str, str]) -> str:
    """Return the sentence that names what cannot be read, with reasons; the first few of many."""
    alike: dict[str, list[str]] = {}
    for name, reason in list(files.items())[:8]:
        alike.setdefault(reason, []).append(name)
    named = ", ".join(f"{', '.join(names)} ({reason})" for reason, names in alike.items())
    rest = f" and {len(files) - 8} more" if len(files) > 8 else ""
    return f"{len(files)} unreadable: {named}{rest}; replace or remove what cannot be read."


def decoded(plan: Plan, numbers: Sequence[int], workers: int = 0) -> Generator[tuple[int, Iterator[Chunk]]]:
    """Yield each episode and its chunks, in order, while threads decode the next ones ahead.

    Args:
        plan: what is decoded, and how.
        numbers: episodes, by their place in `plan.source.episodes`.
        workers: threads; 0: one per core, at most 16.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = max(1, min(workers or min(cores, 16), len(numbers)))
    stop = threading.Event()
    started: deque[tuple[int, Queue[Chunk | None], Future[None]]] = deque()
    todo = iter(numbers)

    def start_next(pool: ThreadPoolExecutor) -> None:
        if (number := next(todo, None)) is not None:
            queue: Queue[Chunk | None] = Queue(_CHUNKS_AHEAD)
            started.append((number, queue, pool.submit(_fill, plan, number, queue, stop)))

    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        try:
            for _ in range(2 * workers):
                start_next(pool)
            while started:
                number, queue, future = started.popleft()
                yield number, _drain(queue, future)
                start_next(pool)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _fill(plan: Plan, number: int, queue: Queue[Chunk | None], stop: threading.Event) -> None:
    """Put an episode's chunks into `queue`, and None at the end, also when the end is an error."""

    def put(item: Chunk | None) -> bool:
        while not stop.is_set():
            with suppress(Full):
                queue.put(item, timeout=0.1)
                return True
        return False

    try:
        for chunk in _chunks(plan, number):
            if not put(chunk):
                return
    finally:
        put(None)


def _drain(queue: Queue[Chunk | None], future: Future[None]) -> Iterator[Chunk]:
    """Yield what a thread puts, then raise the error that ended it, if one did."""
    while (item := queue.get()) is not None:
        yield item
    future.result()


def _chunks(plan: Plan, number: int) -> Iterator[Chunk]:
    """Yield an episode resampled and resized."""
    frames = plan.source.frames(number)
    if plan.fps:
        picked = at_times(frames, (k / plan.fps for k in count()))
    else:
        picked = ((seconds, place, frame) for place, (seconds, frame) in enumerate(frames))
    held: list[tuple[float, int, np.ndarray]] = []
    for seconds, place, frame in picked:
        small = resize(frame[None], plan.resolution, plan.resize)[0]
        if held and (small.shape != held[0][2].shape or len(held) * small.nbytes >= _CHUNK_BYTES):
            yield _chunk(held)
            held = []
        held.append((seconds, place, small))
    if held:
        yield _chunk(held)


def _chunk(held: list[tuple[float, int, np.ndarray]]) -> Chunk:
    times, picks, frames = zip(*held, strict=True)
    return Chunk(np.stack(frames), list(times), list(picks))


def _expected_frames(plan: Plan) -> int:
    """Return the number of frames of the whole entry; near where frames are resampled."""
    ratio = plan.fps / plan.source.fps if plan.fps and plan.source.fps else 1.0
    return sum(max(1, round(episode.frames * ratio)) for episode in plan.source.episodes)


def needed_bytes(plan: Plan) -> int:
    """Return the size of the whole entry; near where frames are resampled, 0 when no frame can be decoded."""
    for number in range(len(plan.source.episodes)):
        with suppress(Unreadable):
            for _, frame in plan.source.frames(number):
                size = plan.resolution**2 * frame.shape[-1] if plan.resolution else frame.size
                return size * _expected_frames(plan)
    return 0


def _require_room(plan: Plan, partial: Path) -> None:
    there = (partial / "frames").stat().st_size if (partial / "frames").exists() else 0
    if shutil.disk_usage(partial.parent).free < needed_bytes(plan) - there:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(partial.parent))


def require_shape(plan: Plan, wanted: tuple[int, ...], got: tuple[int, ...], label: str) -> None:
    """Refuse an episode whose frames differ in size from those before it."""
    if got == wanted:
        return
    hint = (
        "set `resolution` to resize them" if plan.source.resizable else "keep grids of different sizes apart"
    )
    raise UserError(f"{label} has frames of {got}, those before it are {wanted}; {hint}.")


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
