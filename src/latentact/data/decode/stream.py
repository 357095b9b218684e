"""The frames of a dataset an episode at a time: out of the cache where it has them, else decoded on the way.

For work that looks at every frame once and keeps none, so that neither memory nor disk bounds the dataset.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path

import numpy as np

from latentact.data.cache import DataConfig, resolve_source
from latentact.data.decode.pipeline import Chunk, decoded, require_shape, unreadable_message
from latentact.data.format import Source, Unreadable
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
        self._plan, self._folder, memo = resolve_source(config)
        with suppress(OSError):  # on a full or read-only disk no more is lost than a note
            memo.save()
        self.path = Path(config.path)
        """The dataset."""
        self.source: Source = self._plan.source
        """The opened dataset."""
        self.key = self._folder.name
        """Content key of the frames: `digest` of a `FrameStore`."""
        self.fps = self._plan.fps or self.source.fps
        """Frames per second, after resampling."""
        self.resampled = bool(self._plan.fps)
        """Whether frames are picked by time, so that there is not one for each row of the data."""
        ratio = self.fps / self.source.fps if self.source.fps else 1.0
        self.lengths = [max(1, round(e.frames * ratio)) for e in self.source.episodes]
        """Frames of each episode; near where they are resampled."""
        self.strict = config.strict
        """Whether an unreadable file is an error."""
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
        if not self._folder.is_dir():
            with closing(decoded(self._plan, numbers, workers)) as episodes:
                for number, chunks in episodes:
                    yield number, self._checked(self.source.episodes[number].label, chunks)
            return
        meta = json.loads((self._folder / "meta.json").read_text())
        lengths, kept, frame_indices = (
            np.load(self._folder / f"{name}.npy") for name in ("lengths", "episodes", "frame_indices")
        )
        frames = np.memmap(self._folder / "frames", dtype=np.uint8, mode="r", shape=tuple(meta["shape"]))
        ends = {int(n): int(end) for n, end in zip(kept, lengths.cumsum(), strict=True)}
        sizes = dict(zip(kept.tolist(), lengths.tolist(), strict=True))
        for number in numbers:
            if number in ends:
                yield number, _stored(frames, frame_indices, ends[number] - sizes[number], ends[number])
            else:
                yield number, _damaged(meta["unreadable"][self.source.episodes[number].label])

    def _checked(self, label: str, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        try:
            for chunk in chunks:
                self._shape = self._shape or chunk.frames.shape[1:]
                require_shape(self._plan, self._shape, chunk.frames.shape[1:], label)
                yield chunk
        except Unreadable as error:
            if self.strict:
                raise UserError(unreadable_message({label: str(error)})) from error
            raise


def _stored(frames: np.ndarray, frame_indices: np.ndarray, begin: int, end: int) -> Iterator[Chunk]:
    step = max(1, _CHUNK_BYTES // max(1, frames[0].nbytes))
    for first in range(begin, end, step):
        rows = slice(first, min(first + step, end))
        yield Chunk(np.array(frames[rows]), [], frame_indices[rows].tolist())


def _damaged(reason: str) -> Iterator[Chunk]:
    raise Unreadable(reason)
    yield
