"""Scene cuts of a video, from small copies of its frames: hard cuts, dissolves and fades, but not flashes.

- A hard cut changes frames by more than `_LEAST` gray levels and by `_RATIO` times the change of its
  neighbors (or by a third of these levels and three times this ratio). No frame just before it resembles one
  just after it (otherwise it is a flash), and a change of brightness does not explain it.
- In a dissolve the frames in between blend its two ends, with a growing share of the second.
- In a fade the frames in between lose contrast, and its two ends differ.

The rules use at most `MARGIN` frames around a frame, so that a video of any length needs a bounded buffer.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from latentact.data.decode.resize import resize

SIZE = 32
"""Height and width in pixels of the frames that are compared."""
MARGIN = 80
_BLOCK = 2048
_LEAST = 9.0
_RATIO = 3.0
_FLASH = 8
"""Maximum duration of a flash in frames."""
_HALF_WIDTHS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24)
"""Half durations of gradual changes in frames."""
_APART = 16
"""Minimum distance between two gradual changes in frames."""
_GRADUAL = 14.0
"""Minimum change in gray levels over a dissolve or fade."""


class SceneCuts:
    """Find the cuts of one video, block by block: `add` the frames, then call `finish()`."""

    def __init__(self) -> None:
        self._held: np.ndarray = np.zeros((0, SIZE, SIZE, 3), np.uint8)
        self._first = 0
        """Index of the first buffered frame."""
        self._decided = 0
        self._cuts: list[int] = []

    def add(self, frames: UInt8[np.ndarray, "n h w c"]) -> None:
        """Add the next frames of the video."""
        small = np.broadcast_to(resize(frames, SIZE), (len(frames), SIZE, SIZE, 3))
        self._held = np.concatenate([self._held, small])
        if len(self._held) >= _BLOCK + 2 * MARGIN:
            self._decide(self._first + len(self._held) - MARGIN)

    def finish(self) -> list[int]:
        """Return the indices of the frames that start a scene, except the first, ascending."""
        self._decide(self._first + len(self._held))
        return self._cuts

    def _decide(self, end: int) -> None:
        found = self._first + find_cuts(self._held)
        self._cuts += [int(cut) for cut in found if self._decided <= cut < end]
        self._decided = end
        drop = max(0, end - MARGIN - self._first)
        self._held, self._first = self._held[drop:], self._first + drop


def find_cuts(frames: UInt8[np.ndarray, "n 32 32 3"]) -> Int64[np.ndarray, " m"]:
    """Return the indices of the frames that start a scene, except the first, ascending."""
    if len(frames) < 2:
        return np.zeros(0, np.int64)
    pixels = frames.reshape(len(frames), -1).astype(np.float32)
    hard = _hard_cuts(pixels)
    coarse = frames.reshape(len(frames), 16, 2, 16, 2, 3).mean((2, 4), dtype=np.float32)
    return np.sort(np.concatenate([hard, _gradual_cuts(coarse.reshape(len(frames), -1), hard)]))


def _hard_cuts(pixels: Float32[np.ndarray, "n p"]) -> Int64[np.ndarray, " m"]:
    change = np.abs(np.diff(pixels, axis=0)).mean(1)  # entry t - 1: from frame t - 1 to t
    padded = np.pad(change, 3, mode="symmetric")
    around = np.stack([padded[k : k + len(change)] for k in (0, 1, 2, 4, 5, 6)])
    around = np.sort(around, axis=0)
    usual = np.maximum(around[2:4].mean(0), around[4] / 1.5)  # the median, and all but one of them
    large = (change > _LEAST) & (change > _RATIO * usual)
    small = (change > _LEAST / 3) & (change > 3 * _RATIO * usual)
    candidates = np.flatnonzero(large | small) + 1
    return np.array([t for t in candidates if _is_cut(pixels, int(t), float(change[t - 1]))], np.int64)


def _is_cut(pixels: Float32[np.ndarray, "n p"], t: int, change: float) -> bool:
    before, after = pixels[max(0, t - _FLASH) : t], pixels[t : t + _FLASH]
    nearest = min(
        np.abs(after - before[-1]).mean(1).min(),
        np.abs(before - after[0]).mean(1).min(),
    )
    return bool(nearest > 0.5 * change) and not _brightness(before[-1], after[0], change)


def _brightness(a: Float32[np.ndarray, " p"], b: Float32[np.ndarray, " p"], change: float) -> bool:
    """Return whether a change of brightness and contrast explains most of the change from `a` to `b`."""
    first, second = a - a.mean(), b - b.mean()
    product, norm = float(first @ second), float(first @ first)
    alike = product > 0.8 * np.sqrt(norm * float(second @ second)) > 0
    return bool(alike and np.abs(second - product / norm * first).mean() < 0.35 * change)


def _beyond(pixels: Float32[np.ndarray, "n p"], half: int) -> np.ndarray:
    """Return the largest change over `half` frames just before and after each window of 2 * half frames."""
    change = np.abs(pixels[half:] - pixels[:-half]).mean(1)  # entry t: from t to t + half
    windows = len(pixels) - 2 * half
    before, after = np.zeros(windows), np.zeros(windows)
    before[half:] = change[: max(0, windows - half)]
    after[: max(0, len(change) - 2 * half)] = change[2 * half :]
    return np.maximum(before, after)


def _gradual_cuts(pixels: Float32[np.ndarray, "n p"], hard: Int64[np.ndarray, " m"]) -> np.ndarray:
    """Return the middle frames of dissolves and fades."""
    n, score = len(pixels), np.zeros(len(pixels))
    contrast = pixels.reshape(n, -1, 3).std(1).mean(1)
    for half in _HALF_WIDTHS:
        middle = np.arange(half, n - half)
        if not len(middle):
            break
        first, last = pixels[: n - 2 * half], pixels[2 * half :]
        change = np.abs(last - first).mean(1)
        apart = np.searchsorted(hard, middle - half, "right") == np.searchsorted(hard, middle + half, "right")
        ends = np.minimum(contrast[middle - half], contrast[middle + half])
        ratio = change / np.maximum(_beyond(pixels, half), 1e-6)
        usable = apart & (change > _GRADUAL) & (ratio > 1.5)
        faded = usable & (ratio > 2.5) & (contrast[middle] < 0.25 * ends) & (ends > 8)
        share, rest = [], []
        across = (last - first) / np.maximum(((last - first) ** 2).sum(1, keepdims=True), 1e-6)
        for shift in (-(half // 2), 0, half // 2):
            here = pixels[half + shift : n - half + shift] - first
            part = (here * across).sum(1)
            share.append(part)
            rest.append(np.abs(here - part[:, None] * (last - first)).mean(1) / np.maximum(change, 1e-6))
        blended = (
            usable
            & (np.max(rest, axis=0) < np.select([ratio > 4, ratio > 2.5, change > 35], [0.3, 0.2, 0.12], 0))
            & (np.abs(share[1] - 0.5) < 0.2)
        )
        blended &= (share[0] < share[1] - 0.1) & (share[2] > share[1] + 0.1)
        quality = np.where(faded, 2 - contrast[middle] / np.maximum(ends, 1e-6), 0)
        quality = np.maximum(quality, np.where(blended, 1 - np.abs(share[1] - 0.5) - rest[1], 0))
        score[middle] = np.maximum(score[middle], quality)
    cuts = []
    for t in np.argsort(-score, kind="stable"):
        if score[t] <= 0:
            break
        if all(abs(t - other) > _APART for other in cuts):
            cuts.append(int(t))
    return np.array(cuts, np.int64)
