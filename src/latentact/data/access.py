"""Frames that are decoded when indexed, for sources with random access.

A store of such a source needs no cache: `store.frames[rows]` reads and decodes these rows, and memory holds
no others.
"""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64, UInt8

from latentact.data.build import Entry
from latentact.data.decode.pipeline import DecodeSpec, require_shape, unreadable_message
from latentact.data.decode.resize import resize
from latentact.data.format import Unreadable
from latentact.data.time_base import at_times
from latentact.errors import UserError


@runtime_checkable
class Frames(Protocol):
    """The frames of a store, uint8 `[n, h, w, c]`, 0..255: an array, or an object indexed like one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, h, w, c)."""
        ...

    def __len__(self) -> int:
        """Return the number of frames."""
        ...

    def __getitem__(self, rows: Any, /) -> Any:
        """Return the frames at these rows: an integer, a slice, or an array of integers or bools."""
        ...


def index_entry(spec: DecodeSpec) -> Entry:
    """Return the contents of a cache entry of this spec, except the pixels; only one frame is decoded."""
    source = spec.source
    times, indices = [], []
    for number in range(len(source.episodes)):
        seconds = source.times(number)
        index = np.arange(len(seconds))
        if spec.fps:
            every = (k / spec.fps for k in count())
            index = np.array([n for _, n, _ in at_times(zip(seconds, index, strict=True), every)], np.int64)
        times.append(seconds[index])
        indices.append(index)
    lengths = np.array([len(each) for each in times], np.int64)
    first = _frame(spec, 0, 0)
    return Entry(
        shape=(int(lengths.sum()), *first.shape),
        fps=float(spec.fps or source.fps),
        unreadable={},
        episodes=np.arange(len(lengths)),
        lengths=lengths,
        frame_times=np.concatenate(times),
        frame_indices=np.concatenate(indices).astype(np.int64),
    )


class IndexedFrames:
    """The frames of a store, indexed as an array uint8 `[n, h, w, c]`.

    Args:
        spec: decoding settings.
        entry: result of `index_entry`.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, spec: DecodeSpec, entry: Entry) -> None:
        self.shape = entry.shape
        self._spec = spec
        self._index = entry.frame_indices
        self._ends = np.cumsum(entry.lengths)

    def __len__(self) -> int:
        """Return the number of frames."""
        return self.shape[0]

    def __getitem__(self, rows: Any) -> UInt8[np.ndarray, "*rows h w c"]:
        """Return the frames at these rows: an integer, a slice, or an array of integers or bools.

        Raises:
            UserError: a frame cannot be decoded or has a different size.
        """
        rows = rows_of(rows, len(self))
        distinct, places = np.unique(rows, return_inverse=True)
        frames = np.empty((len(distinct), *self.shape[1:]), np.uint8)

        def fill(place: int) -> None:
            row = int(distinct[place])
            number = int(np.searchsorted(self._ends, row, "right"))
            frame = _frame(self._spec, number, int(self._index[row]))
            require_shape(self._spec, self.shape[1:], frame.shape, self._spec.source.episodes[number].label)
            frames[place] = frame

        pool = _pool(os.getpid(), torch.get_num_threads())
        list(pool.map(fill, range(len(distinct))) if pool else map(fill, range(len(distinct))))
        return frames[places].reshape(*rows.shape, *self.shape[1:])


def rows_of(rows: Any, length: int) -> Int64[np.ndarray, "..."]:
    """Return the row numbers selected by an index into an array of this length."""
    if isinstance(rows, slice) or np.asarray(rows).dtype == np.bool_:
        return np.arange(length)[rows]
    rows = np.asarray(rows, np.int64)
    if rows.size and not -length <= rows.min() <= rows.max() < length:
        raise IndexError(f"rows must be between 0 and {length - 1}, got {rows.min()} to {rows.max()}")
    return np.asarray(rows % max(1, length))


def _frame(spec: DecodeSpec, number: int, index: int) -> UInt8[np.ndarray, "h w c"]:
    source = spec.source
    try:
        return resize(source.frame(number, index)[None], spec.resolution, spec.resize)[0]
    except Unreadable as error:
        raise UserError(unreadable_message({source.episodes[number].label: str(error)})) from error


@functools.lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor | None:
    """Return the decoding thread pool; one per process, since a fork does not inherit threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix="frames") if threads > 1 else None
