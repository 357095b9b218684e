"""Decode the episodes of a dataset in order, while threads decode the next ones ahead."""

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
    """Seconds from the episode's first frame at which each was taken."""
    frame_indices: list[int]
    """Number of each frame among the episode's frames before resampling."""


def unreadable_message(files: Mapping[str, str]) -> str:
    """Return the sentence that names what cannot be read, with reasons; the first few of many."""
    alike: dict[str, list[str]] = {}
    for name, reason in list(files.items())[:8]:
        alike.setdefault(reason, []).append(name)
    named = ", ".join(f"{', '.join(names)} ({reason})" for reason, names in alike.items())
    rest = f" and {len(files) - 8} more" if len(files) > 8 else ""
    return f"{len(files)} unreadable: {named}{rest}; replace or remove what cannot be read."


def skipped_message(files: Mapping[str, str]) -> str:
    """Return how many files were left out for each reason, with an example."""
    alike: dict[str, list[str]] = {}
    for name, reason in files.items():
        alike.setdefault(reason, []).append(name)
    counts = [f"{len(names)} ({reason}: {names[0]})" for reason, names in list(alike.items())[:6]]
    return f"{', '.join(counts)}{' and others' if len(alike) > 6 else ''}"


def decoded(
    spec: DecodeSpec, numbers: Sequence[int], workers: int = 0
) -> Generator[tuple[int, Iterator[Chunk]]]:
    """Yield each episode and its chunks, in order, while threads decode the next ones ahead.

    Args:
        spec: what is decoded, and how.
        numbers: episodes, by their place in `spec.source.episodes`.
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
    """Put an episode's chunks into `queue`, and None at the end, also when the end is an error."""

    def put(item: Chunk | None) -> bool:
        while not stop.is_set():
            with suppress(Full):
                queue.put(item, timeout=0.1)
                return True
        return False

    try:
        for chunk in _chunks(spec, number):
            if not put(chunk):
                return
    finally:
        put(None)


def _drain(queue: Queue[Chunk | None], future: Future[None]) -> Iterator[Chunk]:
    """Yield what a thread puts, then raise the error that ended it, if one did."""
    while (item := queue.get()) is not None:
        yield item
    future.result()


def _chunks(spec: DecodeSpec, number: int) -> Iterator[Chunk]:
    """Yield an episode resampled and resized."""
    frames = spec.source.frames(number)
    if spec.fps:
        sampled = at_times(frames, (k / spec.fps for k in count()))
    else:
        sampled = ((seconds, place, frame) for place, (seconds, frame) in enumerate(frames))
    held: list[tuple[float, int, np.ndarray]] = []
    for seconds, place, frame in sampled:
        small = resize(frame[None], spec.resolution, spec.resize)[0]
        if held and (small.shape != held[0][2].shape or len(held) * small.nbytes >= _CHUNK_BYTES):
            yield _chunk(held)
            held = []
        held.append((seconds, place, small))
    if held:
        yield _chunk(held)


def _chunk(held: list[tuple[float, int, np.ndarray]]) -> Chunk:
    times, frame_indices, frames = zip(*held, strict=True)
    return Chunk(np.stack(frames), list(times), list(frame_indices))


def require_shape(spec: DecodeSpec, wanted: tuple[int, ...], got: tuple[int, ...], label: str) -> None:
    """Refuse an episode whose frames differ in size from those before it."""
    if got == wanted:
        return
    hint = (
        "set `resolution` to resize them" if spec.source.resizable else "keep grids of different sizes apart"
    )
    raise UserError(f"{label} has frames of {got}, those before it are {wanted}; {hint}.")
