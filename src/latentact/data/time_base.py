"""What time a frame, a row and a transition has: every rule about time is here.

- A frame of a video has the presentation time of its container, edit lists applied. Where the container names
  none it follows the one before at the stream's rate; where times go back the video is unreadable.
- A row of a LeRobot dataset shows the frame nearest to `from_timestamp + timestamp`, as in LeRobot. Rows of
  images show their own image, and `timestamp` only says when.
- A transition is valid if both of its frames are real, differ, and lie as far apart as the frame gap says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64

from latentact.data.format import Unreadable

LEROBOT_TOLERANCE_S = 1e-4
"""LeRobot's `tolerance_s`: how far the frame of a row may lie from the row's time."""
CONTAINER_TOLERANCE_S = 1e-3
"""A frame counts as not later than a time when it is later by less: Matroska rounds to milliseconds."""
GAP_TOLERANCE = 0.25
"""Share of the frame gap by which the real distance of two frames may differ from it."""
_JITTER = 0.25
"""Share of a frame's duration by which the times of a row and of its frame may differ."""
_UNEVEN = 0.1
"""Share of the usual interval by which the intervals of a constant rate may differ, besides rounding."""


class FrameClock:
    """Turns presentation times of decoded frames into seconds.

    Args:
        rate: frames per second that the stream names; 0: none.
    """

    def __init__(self, rate: float) -> None:
        self._period = 1 / rate if rate else 1.0
        self._last: float | None = None
        self._frames = 0

    def __call__(self, seconds: float | None) -> float:
        """Return the time of the next frame.

        Args:
            seconds: what the container says; None: nothing.

        Raises:
            Unreadable: that is before the frame shown before it.
        """
        last = self._last
        if seconds is None:
            seconds = 0.0 if last is None else last + self._period
        elif last is not None and seconds < last:
            raise Unreadable(
                f"its timestamps go back from {last:.3f} s to {seconds:.3f} s at frame {self._frames}; "
                f"encode it again"
            )
        self._last = seconds
        self._frames += 1
        return seconds


@dataclass(frozen=True, kw_only=True)
class FrameRate:
    """How fast the frames of a video follow each other."""

    fps: float
    """Frames per second; of a video whose rate varies, the slowest that it keeps up. 0: unknown."""
    fastest: float
    """Frames per second of its shortest intervals; equal to `fps` where the rate is constant."""
    uneven: bool
    """Whether the rate varies."""


def frame_rate(times: Float64[np.ndarray, " n"], named: float) -> FrameRate:
    """Return the rate of frames at these ascending times.

    Args:
        times: seconds.
        named: frames per second that the stream names; 0: none.
    """
    intervals = np.diff(times)
    if not len(intervals) or not intervals.any():
        return FrameRate(fps=named, fastest=named, uneven=False)
    usual, (short, long) = float(np.median(intervals)), np.quantile(intervals, [0.1, 0.9])
    if np.abs(intervals - usual).max() > _UNEVEN * usual + 2 * CONTAINER_TOLERANCE_S:
        return FrameRate(fps=round(1 / long, 3), fastest=round(1 / max(short, 1e-3), 3), uneven=True)
    measured = round(len(intervals) / float(times[-1] - times[0]), 3)
    fps = named if abs(named - measured) < 0.01 * measured else measured
    return FrameRate(fps=fps, fastest=fps, uneven=False)


def clock_problem(timestamps: Float64[np.ndarray, " n"]) -> str:
    """Return why the column `timestamp` of an episode is no clock, with the row; empty if it is one."""
    wrong = np.flatnonzero(~np.isfinite(timestamps))
    if len(wrong):
        return f"column timestamp must be finite, got {timestamps[wrong[0]]} in row {wrong[0]}"
    wrong = np.flatnonzero(np.diff(timestamps) <= 0)
    if len(wrong):
        row = int(wrong[0]) + 1
        before, here = timestamps[row - 1], timestamps[row]
        return f"column timestamp must increase, got {here:.9g} s in row {row} after {before:.9g} s"
    return ""


def image_times(timestamps: Float64[np.ndarray, " n"], fps: float) -> tuple[Float64[np.ndarray, " n"], str]:
    """Return the seconds, from the first, of rows with their own images, and what is wrong with their clock.

    A clock that is none, or whose rate is not the dataset's, is replaced by row / fps, as LeRobot counts.
    """
    problem = clock_problem(timestamps)
    if not problem and len(timestamps) > 1:
        usual = float(np.median(np.diff(timestamps)))
        if abs(usual * fps - 1) > GAP_TOLERANCE:
            problem = (
                f"column timestamp has a row every {usual:.9g} s and the dataset has {fps:g} rows per second"
            )
    if problem:
        return np.arange(len(timestamps)) / fps, problem
    return timestamps - timestamps[:1], ""


def nearest_frames[F](
    frames: Iterable[tuple[float, F]], times: Float64[np.ndarray, " n"], fps: float
) -> Iterator[tuple[float, F]]:
    """Yield (time of the frame, frame) for each row of a table: the frame nearest to the row's time.

    LeRobot asks for frames within `LEROBOT_TOLERANCE_S`. A row further off still has its frame as long as no
    other frame can be meant.

    Args:
        frames: (seconds, frame), ascending.
        times: seconds at which rows look into the video, ascending.
        fps: rows per second.

    Raises:
        Unreadable: no frame is near enough to a row, or it is the frame of the row before.
    """
    iterator = iter(frames)
    held, ahead, last = next(iterator, None), next(iterator, None), None
    if held is None:
        raise Unreadable(f"column timestamp, row 0: its video has no frame near {times[0]:.9g} s")
    for row, (time, tolerance) in enumerate(zip(times, lookup_tolerance(times, fps), strict=True)):
        while ahead is not None and abs(ahead[0] - time) < abs(held[0] - time):
            held, ahead = ahead, next(iterator, None)
        if abs(held[0] - time) > tolerance:
            if ahead is None and held[0] < time:
                raise Unreadable(
                    f"column timestamp, row {row} of {len(times)}: it is at {time:.6g} s and the last frame "
                    f"of its video at {held[0]:.6g} s"
                )
            raise Unreadable(
                f"column timestamp, row {row}: its video has no frame at {time:.6g} s, the nearest is at "
                f"{held[0]:.6g} s"
            )
        if last == held[0]:
            raise Unreadable(f"column timestamp: rows {row - 1} and {row} share the frame at {last:.6g} s")
        yield held
        last = held[0]


def lookup_tolerance(times: Float64[np.ndarray, " n"], fps: float) -> Float64[np.ndarray, " n"]:
    """Return how far the frame of each row may lie from the row's time, in seconds."""
    rounding = 2 * np.finfo(np.float32).eps * np.abs(times)  # LeRobot compares in float32
    return np.maximum(LEROBOT_TOLERANCE_S + rounding, _JITTER / fps)


def first_unmatched(
    shown: Float64[np.ndarray, " m"], times: Float64[np.ndarray, " n"], fps: float, *, lerobot: bool = False
) -> int | None:
    """Return the first row for which `nearest_frames` would find no frame; None: there is none.

    Args:
        shown: seconds at which the video shows frames, ascending.
        times: seconds at which rows look into the video, ascending.
        fps: rows per second.
        lerobot: whether LeRobot's own tolerance counts, instead of that of `nearest_frames`.
    """
    padded = np.concatenate([[-np.inf], shown, [np.inf]])
    after = np.searchsorted(padded, times).clip(1, len(padded) - 1)
    nearest = np.where(times - padded[after - 1] <= padded[after] - times, after - 1, after)
    wrong = np.abs(padded[nearest] - times) > lookup_tolerance(times, np.inf if lerobot else fps)
    wrong[1:] |= np.diff(nearest) == 0
    return int(wrong.argmax()) if wrong.any() else None


def at_times[F](
    frames: Iterable[tuple[float, F]], times: Iterable[float], tolerance: float = CONTAINER_TOLERANCE_S
) -> Iterator[tuple[float, int, F]]:
    """Yield (time of the frame, its number, frame): for each time, the last frame that is not later.

    Times after the last frame are left out: what follows it is not known. Frames and times ascend.

    Args:
        frames: (seconds, frame).
        times: seconds; may be endless.
        tolerance: seconds by which a frame may be later than the time for which it is taken.
    """
    wanted = iter(times)
    time = next(wanted, None)
    held: tuple[float, int, F] | None = None
    seconds = -np.inf
    for number, (seconds, frame) in enumerate(frames):
        while held is not None and time is not None and seconds > time + tolerance:
            yield held
            time = next(wanted, None)
        if time is None:
            return
        if held is not None or seconds <= time + tolerance:
            held = seconds, number, frame
        else:
            raise Unreadable(f"its first frame, at {seconds:.3f} s, is later than the first time asked for")
    while held is not None and time is not None and time <= seconds + tolerance:
        yield held
        time = next(wanted, None)


def valid_transitions(
    times: Float64[np.ndarray, " n"],
    episode: Int64[np.ndarray, " n"],
    gap: int,
    fps: float,
    resampled_from: float = 0.0,
) -> Bool[np.ndarray, " n"]:
    """Return from which frames a transition of `gap` frames starts.

    Args:
        times: seconds at which each frame was taken.
        episode: number of each frame's episode.
        gap: frames.
        fps: frames per second of the whole, so that a transition spans `gap / fps` seconds.
        resampled_from: frames per second before resampling, which moves a frame by up to half its duration;
            0: frames are as they were.
    """
    valid = np.zeros(len(times), bool)
    if gap >= len(times):
        return valid
    distance = times[gap:] - times[:-gap]
    slack = max(GAP_TOLERANCE * gap / fps, 0.51 / resampled_from if resampled_from else 0.0)
    near = (distance > 0) & (np.abs(distance - gap / fps) <= slack + 2 * CONTAINER_TOLERANCE_S)
    valid[:-gap] = near & (episode[gap:] == episode[:-gap])
    return valid
