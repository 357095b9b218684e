"""The frames of a dataset an episode at a time: out of the cache where it has them, else decoded on the way.

For work that looks at every frame once and keeps none, so that neither memory nor disk bounds the dataset.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, suppress
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32

from latentact.data.build import Entry, read_entry
from latentact.data.cache import DataConfig, finite, resolve_source, usable_rows
from latentact.data.decode.pipeline import Chunk, decoded, require_shape, unreadable_message
from latentact.data.format import Source, Unreadable
from latentact.data.time_base import valid_transitions
from latentact.errors import UserError

_CHUNK_BYTES = 4 << 20


class FrameStream:
    """What `config` names, decoded as `open_store` would.

    Args:
        config: the data.

    Raises:
        UserError: nothing is there to read.
    """

    def __init__(self, config: DataConfig) -> None:
        """Look at what is there; no frame is decoded."""
        self._spec, self._folder, memo = resolve_source(config)
        with suppress(OSError):  # on a full or read-only disk no more is lost than a note
            memo.save()
        self.path = Path(config.path)
        """The dataset."""
        self.source: Source = self._spec.source
        """The opened dataset."""
        self.key = self._folder.name
        """Content key of the frames: `digest` of a `FrameStore`."""
        self.fps = self._spec.fps or self.source.fps
        """Frames per second, after resampling."""
        self.resampled = bool(self._spec.fps)
        """Whether frames are picked by time, so that there is not one for each row of the data."""
        ratio = self.fps / self.source.fps if self.source.fps else 1.0
        self.lengths = [max(1, round(e.frames * ratio)) for e in self.source.episodes]
        """Frames of each episode; near where they are resampled."""
        self.strict = config.strict
        """Whether an unreadable file is an error."""
        self.resampled_from = self.source.fps if self.resampled else 0.0
        """Frames per second before resampling; 0: frames are as they were."""
        self._drop_nonfinite = config.drop_nonfinite
        self._shape: tuple[int, ...] | None = None

    def episodes(self, numbers: Sequence[int], workers: int = 0) -> Generator[tuple[int, Iterator[Chunk]]]:
        """Yield the named episodes in order, each as the chunks of its frames; threads decode ahead.

        Args:
            numbers: places in `source.episodes`.
            workers: decoding threads; 0: one per core.

        Raises:
            Unreadable: by the chunks of an episode that is damaged.
            UserError: likewise, where the data is to be read strictly; or sizes differ and stay.
        """
        entry = read_entry(self._folder)
        if entry is None:
            with closing(decoded(self._spec, numbers, workers)) as episodes:
                for number, chunks in episodes:
                    yield number, self._checked(self.source.episodes[number].label, chunks)
            return
        frames = np.memmap(self._folder / "frames", dtype=np.uint8, mode="r", shape=entry.shape)
        ends = dict(zip(entry.episodes.tolist(), entry.lengths.cumsum().tolist(), strict=True))
        sizes = dict(zip(entry.episodes.tolist(), entry.lengths.tolist(), strict=True))
        for number in numbers:
            if number in ends:
                yield number, _stored(frames, entry, ends[number] - sizes[number], ends[number])
            else:
                yield number, _damaged(entry.unreadable[self.source.episodes[number].label])

    def transitions(
        self, number: int, times: Sequence[float], frame_indices: Sequence[int], gap: int
    ) -> Bool[np.ndarray, " n"]:
        """Return from which frames of an episode a transition of `gap` frames starts; as of a `FrameStore`.

        Args:
            number: place of the episode in `source.episodes`.
            times: `times` of its chunks.
            frame_indices: likewise.
            gap: frames.
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
        """Rows of the data's tables to use: all, or with `drop_nonfinite` those with finite numbers."""
        usable = usable_rows(self.source)
        return usable if self._drop_nonfinite else np.ones_like(usable)

    @cached_property
    def state(self) -> Float32[np.ndarray, "rows s"] | None:
        """Robot state of each row of the data's tables; None where the data has none.

        Raises:
            UserError: a number is missing, NaN or infinite; with `drop_nonfinite` such rows are zeros.
        """
        column = self.source.column("observation.state")
        if column is None:
            return None
        column = column.reshape(len(column), -1).astype(np.float32)
        where = f"{self.path}, column observation.state"
        return finite(
            column, np.ones(len(column), bool), self._drop_nonfinite, where, lambda row: f"row {row}"
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
    step = max(1, _CHUNK_BYTES // max(1, frames[0].nbytes))
    for first in range(begin, end, step):
        rows = slice(first, min(first + step, end))
        times, indices = entry.frame_times[rows].tolist(), entry.frame_indices[rows].tolist()
        yield Chunk(np.array(frames[rows]), times, indices)


def _damaged(reason: str) -> Iterator[Chunk]:
    raise Unreadable(reason)
    yield
