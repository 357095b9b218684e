"""What `latentact check-data` finds in decoded frames: still spans, duplicates, damage, changing sizes."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float64, UInt8

from latentact.data.decode.pipeline import DecodeSpec, decoded
from latentact.data.decode.resize import resize
from latentact.data.format import Source, Unreadable
from latentact.progress import Progress

SIZE = 96
"""Height and width in pixels at which frames are compared."""
STILL_S = 1.0
"""Seconds without a change that count as a still span."""
_STILL_LEVELS = 0.5
_SHEETS = 8


@dataclass(kw_only=True)
class Sheet:
    """Frames of an episode for the contact sheet."""

    camera: str
    episode: str
    frames: list[UInt8[np.ndarray, "_ _ c"]]
    """First, middle and last frame, at their original size."""


@dataclass(kw_only=True)
class FrameFindings:
    """Findings in the frames of one camera."""

    frames: int = 0
    """Number of frames that were decoded."""
    sheets: list[Sheet] = field(default_factory=list)
    """Frames of the first episodes."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Episodes that cannot be decoded: name -> reason."""
    still: list[dict[str, Any]] = field(default_factory=list)
    """Spans in which nothing changes: camera, episode, start and end in seconds."""
    resized: list[str] = field(default_factory=list)
    """Episodes whose frames change size, and the sizes."""
    fewer: list[str] = field(default_factory=list)
    """Episodes that decode to another number of frames than they list, and both numbers."""
    duplicates: list[list[str]] = field(default_factory=list)
    """Groups of episodes with the same frames."""


def check_frames(source: Source, max_frames: int) -> FrameFindings:
    """Decode frames at a small size, of episodes spread over the data.

    Args:
        source: the data.
        max_frames: frames to decode, of at least one episode; 0: none.
    """
    found = FrameFindings()
    if not source.episodes or not max_frames:
        return found
    order = np.argsort(np.arange(len(source.episodes)) * 0.618034 % 1)  # spread over the data
    ends = np.cumsum([source.episodes[n].frames for n in order])
    chosen = sorted(int(n) for n in order[: max(1, int((ends <= max_frames).sum()))])
    spec = DecodeSpec(source=source, fps=0.0, resolution=0, resize="uint8", strict=False)
    by_digest: dict[str, list[str]] = defaultdict(list)
    total = sum(source.episodes[n].frames for n in chosen)
    with (
        Progress(f"checking {source.camera or 'frames'}", total, "frames") as progress,
        closing(decoded(spec, chosen)) as episodes,
    ):
        for number, chunks in episodes:
            episode = source.episodes[number]
            statistics = _EpisodeStatistics(episode.frames, source.resizable)
            try:
                for chunk in chunks:
                    statistics.add(chunk.frames, chunk.times)
                    progress.advance(len(chunk.frames))
            except Unreadable as error:
                found.unreadable[episode.label] = str(error)
                continue
            found.frames += statistics.frames
            if statistics.frames != episode.frames:
                found.fewer.append(f"{episode.name} ({statistics.frames} of {episode.frames})")
            by_digest[statistics.digest].append(episode.name)
            if len(statistics.sizes) > 1:
                sizes = ", ".join(f"{width}x{height}" for height, width in statistics.sizes)
                found.resized.append(f"{episode.name} ({sizes})")
            for begin, end in still_spans(np.array(statistics.changes), np.array(statistics.times)):
                span = {"camera": source.camera, "episode": episode.name, "from_s": begin, "to_s": end}
                found.still.append(span)
            if len(found.sheets) < _SHEETS:
                sheet = Sheet(camera=source.camera, episode=episode.name, frames=statistics.kept)
                found.sheets.append(sheet)
    found.duplicates = [names for names in by_digest.values() if len(names) > 1]
    return found


class _EpisodeStatistics:
    """Statistics of an episode's frames, updated chunk by chunk."""

    def __init__(self, expected: int, resizable: bool) -> None:
        self._size = SIZE if resizable else 0
        self.frames = 0
        self.times: list[float] = []
        self.changes: list[float] = []
        self.kept: list[np.ndarray] = []
        self.sizes: dict[tuple[int, ...], None] = {}
        self._places = {0, expected // 2, max(expected - 1, 0)}
        self._hash = hashlib.blake2b(digest_size=16)
        self._last: np.ndarray | None = None

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def add(self, frames: UInt8[np.ndarray, "n h w c"], times: list[float]) -> None:
        self.kept += [frame for n, frame in enumerate(frames, self.frames) if n in self._places]
        self.sizes[frames.shape[1:3]] = None
        small = resize(frames, self._size)
        self._hash.update(np.ascontiguousarray(small))
        whole = small if self._last is None else np.concatenate([self._last[None], small])
        self.changes += np.abs(np.diff(whole.astype(np.int16), axis=0)).mean((1, 2, 3)).tolist()
        self._last, self.times, self.frames = small[-1], self.times + times, self.frames + len(frames)


def still_spans(
    changes: Float64[np.ndarray, " m"], times: Float64[np.ndarray, " n"]
) -> list[tuple[float, float]]:
    """Return (start, end) in seconds of every span of at least `STILL_S` seconds in which nothing changes.

    Args:
        changes: mean difference between neighboring frames in gray levels, one fewer than frames.
        times: times of the frames in seconds.
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[0], (changes < _STILL_LEVELS).astype(int), [0]])))
    spans = [(float(times[begin]), float(times[end])) for begin, end in edges.reshape(-1, 2)]
    return [(begin, end) for begin, end in spans if end - begin >= STILL_S]
