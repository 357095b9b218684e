"""Decode the episodes of a dataset in order; threads decode ahead."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from queue import Full, Queue

import numpy as np
from jaxtyping import UInt8

from latentact.data.decode.resize import resize
from latentact.data.format import Source
from latentact.data.time_base import at_times
from latentact.errors import UserError

_CHUNK_BYTES = 4 << 20
_CHUNKS_AHEAD = 8


@dataclass(frozen=True, kw_only=True)
class DecodeSpec:
    """What to decode and how."""

    source: Source
    """Opened dataset."""
    fps: float
    """Frames per second to resample to; 0: no resampling."""
    resolution: int
    """Height and width in pixels to resize to; 0: no resizing."""
    resize: str
    """Resize method, one of `latentact.types.KERNELS`."""
    strict: bool
    """Raise an error for an unreadable episode instead of skipping it."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive frames of one episode."""

    frames: UInt8[np.ndarray, "n h w c"]
    times: list[float]
    """Time of each frame, in seconds since the first frame of the episode."""
    frame_indices: list[int]
    """Index of each frame in the episode before resampling."""


def unreadable_message(files: Mapping[str, str], remedy: str = "") -> str:
    """Return a message that lists unreadable files with reasons, at most eight of them, and a remedy."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in list(files.items())[:8]:
        by_reason.setdefault(reason, []).append(name)
    named = ", ".join(f"{', '.join(names)} ({reason})" for reason, names in by_reason.items())
    rest = f" and {len(files) - 8} more" if len(files) > 8 else ""
    return (
        f"{len(files)} unreadable: {named}{rest}; replace or remove these files{remedy and f' ({remedy})'}."
    )


def skipped_message(files: Mapping[str, str]) -> str:
    """Return the number of skipped files per reason, with one example each."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in files.items():
        by_reason.setdefault(reason, []).append(name)
    counts = [f"{len(names)} ({reason}: {names[0]})" for reason, names in list(by_reason.items())[:6]]
    return f"{', '.join(counts)}{' and others' if len(by_reason) > 6 else ''}"


def decoded(
    spec: DecodeSpec, numbers: Sequence[int], workers: int = 0
) -> Generator[tuple[int, Iterator[Chunk]]]:
    """Yield (episode, chunks of frames) in the given order; threads decode ahead.

    Args:
        spec: what to decode and how.
        numbers: indices into `spec.source.episodes`.
        workers: threads; 0: one per core, at most 16.

    Raises:
        Unreadable: while iterating over the chunks of a damaged episode.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = max(1, min(workers or min(cores, 16), len(numbers)))
    stop = threading.Event()
    started: deque[tuple[int, Queue[Chunk | None], Future[None]]] = deque()
    remaining = iter(numbers)

    def start_next(pool: ThreadPoolExecutor) -> None:
        if (number := next(remaining, None)) is not None:
            queue: Queue[Chunk | None] = Queue(_CHUNKS_AHEAD)
            started.append((number, queue, pool.submit(_fill, spec, number, queue, stop)))

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


def _fill(spec: DecodeSpec, number: int, queue: Queue[Chunk | None], stop: threading.Event) -> None:
    """Put the chunks of an episode into `queue`, followed by None even if decoding fails."""

    def put(item: Chunk | None) -> bool:
        while not stop.is_set():
            with suppress(Full):
                queue.put(item, timeout=0.1)
                return True
        return False

    try:
        for chunk in episode_chunks(spec, number):
            if not put(chunk):
                return
    finally:
        put(None)


def _drain(queue: Queue[Chunk | None], future: Future[None]) -> Iterator[Chunk]:
    """Yield the chunks that a thread decodes; raise its error, if any, at the end."""
    while (item := queue.get()) is not None:
        yield item
    future.result()


def episode_chunks(spec: DecodeSpec, number: int) -> Iterator[Chunk]:
    """Yield an episode, resampled and resized."""
    frames = spec.source.frames(number)
    if spec.fps:
        sampled = at_times(frames, (k / spec.fps for k in count()))
    else:
        sampled = ((seconds, index, frame) for index, (seconds, frame) in enumerate(frames))
    pending: list[tuple[float, int, np.ndarray]] = []
    for seconds, index, frame in sampled:
        small = resize(np.ascontiguousarray(frame)[None], spec.resolution, spec.resize)[0]
        if pending and (small.shape != pending[0][2].shape or len(pending) * small.nbytes >= _CHUNK_BYTES):
            yield _chunk(pending)
            pending = []
        pending.append((seconds, index, small))
    if pending:
        yield _chunk(pending)


def _chunk(samples: list[tuple[float, int, np.ndarray]]) -> Chunk:
    times, frame_indices, frames = zip(*samples, strict=True)
    return Chunk(np.stack(frames), list(times), list(frame_indices))


def require_shape(spec: DecodeSpec, expected: tuple[int, ...], got: tuple[int, ...], label: str) -> None:
    """Raise a UserError if the frames of an episode differ in shape from those of earlier episodes."""
    if got == expected:
        return
    hint = (
        "set `resolution` to resize them"
        if spec.source.resizable
        else "keep grids of different sizes in separate datasets"
    )
    raise UserError(
        f"{label} must have frames of shape {expected} as those of earlier episodes, got {got}; {hint}."
    )
