"""Times of frames, rows and transitions, and agreement of rates and gaps.

- A video frame has the presentation time of its container, with edit lists applied. A frame without one
  follows the previous frame at the stream's rate; a video whose times decrease is unreadable.
- A row of a LeRobot dataset has the frame nearest to `from_timestamp + timestamp`, as in LeRobot. Rows with
  images have their own image, at `timestamp`.
- A transition is valid if both of its frames are valid, differ, and are one frame gap apart.
- Everywhere, two gaps agree within `GAP_TOLERANCE` and two rates within `RATE_TOLERANCE`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from latentact.data.format import Unreadable
from latentact.errors import UserError
from latentact.types import LatentActionSpec

log = logging.getLogger(__name__)

LEROBOT_TOLERANCE_S = 1e-4
"""LeRobot's `tolerance_s`: maximum distance of a row's frame from the row's time."""
CONTAINER_TOLERANCE_S = 1e-3
"""Rounding of container times: Matroska rounds to milliseconds."""
GAP_TOLERANCE = 0.25
"""Relative difference up to which two time gaps agree."""
RATE_TOLERANCE = 0.01
"""Relative difference up to which two frame rates agree."""
INTEGER_RATE_TOLERANCE = 1e-3
"""Maximum distance of a frame rate from an integer, which conversion to LeRobot v3.0 requires."""
_JITTER = 0.25
"""Maximum difference between the times of a row and of its frame, in frames."""
_UNEVEN = 0.1
"""Maximum relative deviation from the median interval at a constant rate, apart from rounding."""


def gaps_agree(seconds: float, reference: float) -> bool:
    """Return whether a time gap is within `GAP_TOLERANCE` of a reference."""
    return bool(abs(seconds - reference) <= GAP_TOLERANCE * reference)


def rates_agree(fps: float, reference: float) -> bool:
    """Return whether a rate is within `RATE_TOLERANCE` of a reference."""
    return bool(abs(fps - reference) <= RATE_TOLERANCE * reference)


def is_integer_rate(fps: float) -> bool:
    """Return whether a rate is within `INTEGER_RATE_TOLERANCE` of an integer."""
    return abs(fps - round(fps)) <= INTEGER_RATE_TOLERANCE


def require_gap(seconds: float) -> None:
    """Check a frame gap before any frame is decoded; 0 means the LAM's own.

    Raises:
        UserError: it is negative or not finite.
    """
    if not 0 <= seconds < math.inf:
        raise UserError(f"--frame-gap-s must be at least 0 seconds and finite, got {seconds:g}.")


def frames_in_gap(seconds: float, fps: float, data: object, *, setting: str, remedy: str = "") -> int:
    """Return the whole number of frames nearest to a gap, at least 1.

    Args:
        seconds: the gap, more than 0.
        fps: frames per second of the data.
        data: name of the data, for messages.
        setting: name of the gap, for messages.
        remedy: advice for the message; empty: the nearest gap of the data.

    Raises:
        UserError: the gap is not close to a number of frames, or the rate is 0.
    """
    if not fps:
        raise UserError(
            f"{setting} must be 0 for {data}, which has no frame rate, got {seconds:g}. Give the rate with "
            "data.fps=N."
        )
    frames = max(1, round(seconds * fps))
    if not gaps_agree(frames / fps, seconds):
        remedy = remedy or f"Set it to {frames / fps:.3g}, the nearest, or give data at another rate."
        raise UserError(
            f"{setting} must be near a whole number of frames of {data}, which has a frame every "
            f"{1 / fps:g} s, got {seconds:g} s. {remedy}"
        )
    if not rates_agree(frames / fps, seconds):
        log.warning("transitions of %s span %g s, although %s is %g s", data, frames / fps, setting, seconds)
    return frames


def lam_frame_gap(
    spec: LatentActionSpec, fps: float, data: object, seconds: float = 0.0, remedy: str = ""
) -> int:
    """Return the number of frames of the data that a transition of a LAM spans.

    Args:
        spec: of the LAM.
        fps: frames per second of the data; 0: unknown.
        data: name of the data, for messages.
        seconds: gap to use; 0: the LAM's own gap, in frames if it has none in seconds.
        remedy: as for `frames_in_gap`.

    Raises:
        UserError: the gap is not close to a number of frames of the data.
    """
    gap = seconds or spec.frame_gap_s
    if not gap or not fps:
        return spec.frame_gap
    setting = "--frame-gap-s" if seconds else f"the frame gap of the LAM {spec.model}"
    remedy = remedy or f"Give --frame-gap-s {max(1, round(gap * fps)) / fps:.3g}, the nearest, or other data."
    return frames_in_gap(gap, fps, data, setting=setting, remedy=remedy)


class FrameClock:
    """Converts presentation times of decoded frames to seconds.

    Args:
        rate: frames per second of the stream; 0: unknown.
    """

    def __init__(self, rate: float) -> None:
        self._period = 1 / rate if rate else 1.0
        self._last: float | None = None
        self._frames = 0

    def __call__(self, seconds: float | None) -> float:
        """Return the time of the next frame.

        Args:
            seconds: presentation time of the container; None: the frame has none.

        Raises:
            Unreadable: the time is before that of the previous frame.
        """
        last = self._last
        if seconds is None:
            seconds = 0.0 if last is None else last + self._period
        elif last is not None and seconds < last:
            raise Unreadable(
                f"its timestamps must not decrease, got {seconds:.3f} s after {last:.3f} s at frame "
                f"{self._frames}; encode it again"
            )
        self._last = seconds
        self._frames += 1
        return seconds


@dataclass(frozen=True, kw_only=True)
class FrameRate:
    """Frame rate of a video."""

    fps: float
    """Frames per second; for a variable rate, the rate of its longest intervals. 0: unknown."""
    fastest: float
    """Frames per second of its shortest intervals; equal to `fps` if the rate is constant."""
    uneven: bool
    """Whether the rate varies."""


def frame_rate(times: Float64[np.ndarray, " n"], named: float) -> FrameRate:
    """Return the rate of frames at these ascending times.

    Args:
        times: seconds.
        named: frames per second of the stream; 0: unknown.
    """
    intervals = np.diff(times)
    if not len(intervals) or not intervals.any():
        return FrameRate(fps=named, fastest=named, uneven=False)
    usual, (short, long) = float(np.median(intervals)), np.quantile(intervals, [0.1, 0.9])
    if np.abs(intervals - usual).max() > _UNEVEN * usual + 2 * CONTAINER_TOLERANCE_S:
        return FrameRate(fps=round(1 / long, 3), fastest=round(1 / max(short, 1e-3), 3), uneven=True)
    measured = round(len(intervals) / float(times[-1] - times[0]), 3)
    fps = named if rates_agree(named, measured) else measured
    return FrameRate(fps=fps, fastest=fps, uneven=False)


def clock_problem(timestamps: Float64[np.ndarray, " n"]) -> str:
    """Return the first problem of an episode's column `timestamp`, with its row; empty if there is none."""
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
    """Return the times of rows with images, relative to the first, and the problem of their timestamps.

    Timestamps with a problem, or whose rate differs from the dataset's, are replaced by row / fps, as in
    LeRobot.
    """
    problem = clock_problem(timestamps)
    if not problem and len(timestamps) > 1:
        usual = float(np.median(np.diff(timestamps)))
        if not gaps_agree(usual, 1 / fps):
            problem = f"column timestamp must have {fps:g} rows per second, got a row every {usual:.9g} s"
    if problem:
        return np.arange(len(timestamps)) / fps, problem
    return timestamps - timestamps[:1], ""


def row_times(times: Float64[np.ndarray, " n"], fps: float) -> Float32[np.ndarray, " n"]:
    """Return the column `timestamp` of rows: row / fps if LeRobot's tolerance permits, else their times."""
    regular, seconds = np.arange(len(times)) / fps, times - times[0]
    near = np.abs(seconds - regular).max() < LEROBOT_TOLERANCE_S
    return (regular if near else seconds).astype(np.float32)


def nearest_frames[F](
    frames: Iterable[tuple[float, F]], times: Float64[np.ndarray, " n"], fps: float
) -> Iterator[tuple[float, F]]:
    """Yield (time of the frame, frame) for each row of a table: the frame nearest to the row's time.

    LeRobot requires frames within `LEROBOT_TOLERANCE_S`. A row further off has a frame if it is unambiguous.

    Args:
        frames: (seconds, frame), ascending.
        times: times of the rows in the video, seconds, ascending.
        fps: rows per second.

    Raises:
        Unreadable: no frame is near enough to a row, or two rows have the same frame.
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


def lookup_span(times: Float64[np.ndarray, " n"], fps: float) -> tuple[float, float]:
    """Return start and end, in seconds, of the part of a video with the frames of rows at these times."""
    return float(times[0] - 1 / fps), float(times[-1] + 1 / fps)


def row_problem(shown: Float64[np.ndarray, " m"], times: Float64[np.ndarray, " n"], fps: float) -> str:
    """Return why `nearest_frames` fails for rows of a video; empty if it succeeds.

    Args:
        shown: presentation times of the video's frames, seconds, ascending.
        times: times of the rows in the video, seconds, ascending.
        fps: rows per second.
    """
    if first_unmatched(shown, times, fps) is None:
        return ""
    start, stop = lookup_span(times, fps)
    near = shown[(start <= shown) & (shown < stop)].tolist()
    try:
        for _ in nearest_frames(zip(near, near, strict=True), times, fps):
            pass
    except Unreadable as error:
        return str(error)
    return ""


def lerobot_misses(
    shown: Float64[np.ndarray, " m"], times: Float64[np.ndarray, " n"]
) -> Int64[np.ndarray, " wrong"]:
    """Return the rows for which LeRobot, which compares in float32, finds no frame within its tolerance.

    Args:
        shown: presentation times of the video's frames, seconds, ascending.
        times: times of the rows in the video, seconds.
    """
    padded = np.concatenate([[-np.inf], shown, [np.inf]]).astype(np.float32)
    rows = times.astype(np.float32)
    after = np.searchsorted(padded, rows).clip(1, len(padded) - 1)
    distance = np.minimum(np.abs(rows - padded[after - 1]), np.abs(padded[after] - rows))
    return np.flatnonzero(~(distance < LEROBOT_TOLERANCE_S))


def lookup_tolerance(times: Float64[np.ndarray, " n"], fps: float) -> Float64[np.ndarray, " n"]:
    """Return the maximum distance of each row's frame from the row's time, in seconds."""
    rounding = 2 * np.finfo(np.float32).eps * np.abs(times)  # LeRobot compares in float32
    return np.maximum(LEROBOT_TOLERANCE_S + rounding, _JITTER / fps)


def first_unmatched(
    shown: Float64[np.ndarray, " m"], times: Float64[np.ndarray, " n"], fps: float
) -> int | None:
    """Return the first row for which `nearest_frames` fails; None if there is none.

    Args:
        shown: presentation times of the video's frames, seconds, ascending.
        times: times of the rows in the video, seconds, ascending.
        fps: rows per second.
    """
    padded = np.concatenate([[-np.inf], shown, [np.inf]])
    after = np.searchsorted(padded, times).clip(1, len(padded) - 1)
    nearest = np.where(times - padded[after - 1] <= padded[after] - times, after - 1, after)
    wrong = np.abs(padded[nearest] - times) > lookup_tolerance(times, fps)
    wrong[1:] |= np.diff(nearest) == 0
    return int(wrong.argmax()) if wrong.any() else None


def at_times[F](
    frames: Iterable[tuple[float, F]], times: Iterable[float], tolerance: float = CONTAINER_TOLERANCE_S
) -> Iterator[tuple[float, int, F]]:
    """Yield (time of the frame, its number, frame) of the last frame at or before each time.

    Times after the last frame are left out. Frames and times ascend.

    Args:
        frames: (seconds, frame).
        times: seconds; may be endless.
        tolerance: seconds by which a frame may be later than its time.
    """
    remaining = iter(times)
    time = next(remaining, None)
    held: tuple[float, int, F] | None = None
    seconds = -np.inf
    for number, (seconds, frame) in enumerate(frames):
        while held is not None and time is not None and seconds > time + tolerance:
            yield held
            time = next(remaining, None)
        if time is None:
            return
        if held is not None or seconds <= time + tolerance:
            held = seconds, number, frame
        else:
            raise Unreadable(f"its first frame, at {seconds:.3f} s, is later than the first requested time")
    while held is not None and time is not None and time <= seconds + tolerance:
        yield held
        time = next(remaining, None)


def valid_transitions(
    times: Float64[np.ndarray, " n"],
    episode: Int64[np.ndarray, " n"],
    gap: int,
    fps: float,
    resampled_from: float = 0.0,
) -> Bool[np.ndarray, " n"]:
    """Return the frames that start a valid transition of `gap` frames.

    Args:
        times: time of each frame, seconds.
        episode: index of each frame's episode.
        gap: frames.
        fps: frames per second; a transition spans `gap / fps` seconds.
        resampled_from: frames per second before resampling, which shifts a frame by up to half its duration;
            0: not resampled.
    """
    valid = np.zeros(len(times), bool)
    if gap >= len(times):
        return valid
    distance = times[gap:] - times[:-gap]
    slack = max(GAP_TOLERANCE * gap / fps, 0.51 / resampled_from if resampled_from else 0.0)
    near = (distance > 0) & (np.abs(distance - gap / fps) <= slack + 2 * CONTAINER_TOLERANCE_S)
    valid[:-gap] = near & (episode[gap:] == episode[:-gap])
    return valid
