"""Stream the frames of a dataset episode by episode, from the cache if possible, else decoded on the fly.

For single-pass work such as labeling, where neither memory nor disk should limit the size of the dataset.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, suppress
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float32

from latentact.data.build import Entry, read_entry
from latentact.data.cache import DataConfig, resolve_source
from latentact.data.decode.pipeline import Chunk, decoded, require_shape, unreadable_message
from latentact.data.format import Source, Unreadable
from latentact.data.locate import resolve_dataset
from latentact.data.store import finite, usable_rows
from latentact.data.time_base import valid_transitions
from latentact.errors import UserError

_CHUNK_BYTES = 4 << 20


class FrameStream:
    """Frames of a dataset, episode by episode; the same pixels and timestamps as `open_store` returns.

    Args:
        config: dataset and decoding settings.

    Raises:
        UserError: the dataset is missing or has no readable episode.
    """

    def __init__(self, config: DataConfig) -> None:
        """Scan the dataset; no frame is decoded."""
        self._spec, self._folder, memo = resolve_source(config)
        with suppress(OSError):  # full or read-only disk: only bookkeeping is lost
            memo.save()
        self.path = resolve_dataset(config.path)
        """Path of the dataset."""
        self.source: Source = self._spec.source
        """Opened dataset."""
        self.key = self._folder.name
        """Key of the cache entry, as `FrameStore.digest`."""
        self.fps = self._spec.fps or self.source.fps
        """Frames per second, after resampling."""
        self.resampled = bool(self._spec.fps)
        """Whether frames are resampled by time, so that the numbers of frames and table rows differ."""
        ratio = self.fps / self.source.fps if self.source.fps else 1.0
        self.lengths = [max(1, round(e.frames * ratio)) for e in self.source.episodes]
        """Number of frames of each episode; an estimate if frames are resampled."""
        self.groups: tuple[tuple[int, int], ...] = tuple(
            (begin, end) for begin, end in self.source.groups if begin < end
        )
        """First episode, and last + 1, of each shard, as indices into `source.episodes`; empty for data that
        is not in shards."""
        self.strict = config.strict
        """Whether unreadable files raise an error."""
        self.resampled_from = self.source.fps if self.resampled else 0.0
        """Frames per second before resampling; 0: not resampled."""
        self._drop_nonfinite = config.drop_nonfinite
        self._shape: tuple[int, ...] | None = None

    def episodes(self, numbers: Sequence[int], workers: int = 0) -> Generator[tuple[int, Iterator[Chunk]]]:
        """Yield (episode, chunks of frames) in the given order; threads decode ahead.

        Args:
            numbers: indices into `source.episodes`.
            workers: decoding threads; 0: one per core.

        Raises:
            Unreadable: while iterating over the chunks of a damaged episode.
            UserError: an episode is damaged and `strict` is set, or frame sizes differ and the resolution
                is 0.
        """
        entry = read_entry(self._folder)
        if entry is None:
            with closing(decoded(self._spec, numbers, workers)) as episodes:
                for number, chunks in episodes:
                    yield number, self._checked(self.source.episodes[number].label, chunks)
            return
        frames = np.memmap(self._folder / "frames", dtype=np.uint8, mode="r", shape=entry.shape)
        ends = entry.lengths.cumsum()
        spans = {
            int(number): (int(end - length), int(end))
            for number, length, end in zip(entry.episodes, entry.lengths, ends, strict=True)
        }
        for number in numbers:
            if number in spans:
                yield number, _stored(frames, entry, *spans[number])
            else:
                yield number, _damaged(entry.unreadable[self.source.episodes[number].label])

    def transitions(
        self, number: int, times: Sequence[float], frame_indices: Sequence[int], gap: int
    ) -> Bool[np.ndarray, " n"]:
        """Return the mask of frames that start a valid transition, as `FrameStore.transitions` does.

        Args:
            number: index into `source.episodes`.
            times: times of all frames of the episode, from its chunks.
            frame_indices: frame indices of all frames of the episode, from its chunks.
            gap: number of frames.
        """
        valid = valid_transitions(
            np.asarray(times), np.zeros(len(times), np.int64), gap, self.fps, self.resampled_from
        )
        if self._drop_nonfinite:
            usable = self.usable[self.source.first_rows[number] + np.asarray(frame_indices)]
            valid[:-gap] &= usable[:-gap] & usable[gap:]
        return valid

    @cached_property
    def usable(self) -> Bool[np.ndarray, " rows"]:
        """Mask of table rows to use: all, or with `drop_nonfinite` those with finite state and action."""
        usable = usable_rows(self.source)
        return usable if self._drop_nonfinite else np.ones_like(usable)

    @cached_property
    def state(self) -> Float32[np.ndarray, "rows s"] | None:
        """Robot state of each table row; None for data without states.

        Raises:
            UserError: a value is missing, NaN or infinite; with `drop_nonfinite` such rows are zeros instead.
        """
        column = self.source.column("observation.state")
        if column is None:
            return None
        column = column.reshape(len(column), -1).astype(np.float32)
        return finite(
            column,
            required=np.ones(len(column), bool),
            drop=self._drop_nonfinite,
            where=f"{self.path}, column observation.state",
            row_name=lambda row: f"row {row}",
        )

    def _checked(self, label: str, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        try:
            for chunk in chunks:
                self._shape = self._shape or chunk.frames.shape[1:]
                require_shape(self._spec, self._shape, chunk.frames.shape[1:], label)
                yield chunk
        except Unreadable as error:
            if self.strict:
                raise UserError(unreadable_message({label: str(error)})) from error
            raise


def _stored(frames: np.ndarray, entry: Entry, begin: int, end: int) -> Iterator[Chunk]:
    """Yield rows begin to end of a cache entry as chunks."""
    step = max(1, _CHUNK_BYTES // max(1, frames[0].nbytes))
    for first in range(begin, end, step):
        rows = slice(first, min(first + step, end))
        times, indices = entry.frame_times[rows].tolist(), entry.frame_indices[rows].tolist()
        yield Chunk(np.array(frames[rows]), times, indices)


def _damaged(reason: str) -> Iterator[Chunk]:
    raise Unreadable(reason)
    yield
