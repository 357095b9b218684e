"""Video files: what is in them, their frames with times, and frames at given times.

PyAV decodes out of the box. Where torchcodec loads (it needs FFmpeg's libraries) it decodes whole files.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import av.logging
import numpy as np
from av.error import FFmpegError
from jaxtyping import UInt8

from latentact.data.format import Unreadable

if TYPE_CHECKING:
    from av.container import InputContainer

SUFFIXES = frozenset({".mp4", ".webm", ".mkv", ".mov", ".gif", ".avi"})
TOLERANCE_S = 1e-3
"""A frame counts as not later than a moment when it is later by less: Matroska rounds to milliseconds."""
_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a video file holds."""

    frames: int
    """Number of frames."""
    fps: float
    """Average frames per second; 0 when there is a single frame and the file names no rate."""


def probe(path: Path) -> VideoInfo:
    """Return what a video file holds, from its packets, without decoding them.

    Raises:
        Unreadable: it is not a video, or it is cut short.
    """
    try:
        with closing(_quietly_open(path)) as container:
            return _probe(container)
    except (FFmpegError, OSError) as error:
        raise Unreadable(_reason(error)) from error


def decode(
    path: Path, start: float = -math.inf, stop: float = math.inf
) -> Iterator[tuple[float, UInt8[np.ndarray, "h w 3"]]]:
    """Yield (seconds, upright RGB frame) for the frames of a video with start <= seconds < stop, in order.

    Raises:
        Unreadable: it is not a video, or damaged.
    """
    whole = start == -math.inf and stop == math.inf
    if whole and path.suffix.lower() != ".gif" and (decoders := torchcodec_decoders()):
        yield from _decode_by_torchcodec(decoders, path)
        return
    try:
        with _quietly_open(path) as container:
            yield from _decode(container, start, stop)
    except (FFmpegError, OSError) as error:
        raise Unreadable(_reason(error)) from error


def _quietly_open(path: Path) -> InputContainer:
    """Open a video; set at each opening, because lerobot's writers switch FFmpeg's own messages back on."""
    av.logging.set_level(None)
    return av.open(str(path))


def at_times[F](
    frames: Iterable[tuple[float, F]], times: Iterable[float], tolerance: float = TOLERANCE_S
) -> Iterator[tuple[float, int, F]]:
    """Yield (time, number of the frame, frame): for each time, the last frame that is not later.

    Times after the last frame are left out: what follows it is not known. Frames and times ascend.

    Args:
        frames: (seconds, frame).
        times: seconds; may be endless.
        tolerance: seconds by which a frame may be later than the time for which it is taken.
    """
    wanted = iter(times)
    time = next(wanted, None)
    held: tuple[int, F] | None = None
    seconds = -math.inf
    for number, (seconds, frame) in enumerate(frames):
        while held is not None and time is not None and seconds > time + tolerance:
            yield time, *held
            time = next(wanted, None)
        if time is None:
            return
        if held is not None or seconds <= time + tolerance:
            held = number, frame
        else:
            raise Unreadable(f"its first frame, at {seconds:.3f} s, is later than the first moment wanted")
    while held is not None and time is not None and time <= seconds + tolerance:
        yield time, *held
        time = next(wanted, None)


@functools.cache
def torchcodec_decoders() -> Any:
    """Return `torchcodec.decoders`, or None where it is not installed or finds no FFmpeg; prints nothing."""
    if importlib.util.find_spec("torchcodec") is None:
        return None
    try:
        return importlib.import_module("torchcodec.decoders")
    except (ImportError, OSError, RuntimeError):  # its message is pages long; PyAV decodes as well
        return None


def _decode_by_torchcodec(decoders: Any, path: Path) -> Iterator[tuple[float, np.ndarray]]:
    try:
        decoder = decoders.VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1)
        for begin in range(0, len(decoder), _BATCH):
            batch = decoder.get_frames_in_range(begin, min(begin + _BATCH, len(decoder)))
            yield from zip(batch.pts_seconds.tolist(), batch.data.numpy(), strict=True)
    except (RuntimeError, ValueError) as error:
        raise Unreadable(_reason(error).partition("\n")[0]) from error


def _video_stream(container: InputContainer) -> av.VideoStream:
    if not container.streams.video:
        raise Unreadable("it has no video stream")
    return container.streams.video[0]


def _probe(container: InputContainer) -> VideoInfo:
    stream = _video_stream(container)
    packets = [p.pts if p.pts is not None else p.dts for p in container.demux(stream) if p.size]
    if not packets:
        raise Unreadable("it has no frames")
    if len(packets) < stream.frames:
        raise Unreadable(f"it is cut short: {len(packets)} of its {stream.frames} frames are there")
    ticks = [tick for tick in packets if tick is not None]
    named = float(stream.average_rate or 0)
    span = float((max(ticks) - min(ticks)) * stream.time_base) if ticks and stream.time_base else 0.0
    measured = round((len(packets) - 1) / span, 3) if span else named
    if len(container.streams) == 1 and container.duration and measured:  # Matroska says no number of frames
        named_s, found_s = container.duration / av.time_base, span + 1 / measured
        if found_s < named_s - max(0.5, 3 / measured):
            raise Unreadable(f"it is cut short: {found_s:.1f} of its {named_s:.1f} seconds are there")
    return VideoInfo(frames=len(packets), fps=named if abs(named - measured) < 0.01 * measured else measured)


def _decode(container: InputContainer, start: float, stop: float) -> Iterator[tuple[float, np.ndarray]]:
    stream = _video_stream(container)
    frames: Iterator[av.VideoFrame] = container.decode(stream)
    if start > 0 and stream.time_base:
        container.seek(int(start / stream.time_base), stream=stream)
        first = next(frames, None)
        if first is None or _seconds(first, 0, stream) > start:
            # Seeking goes by decoding time, so with reordered frames it can land late: start over.
            container.seek(0, stream=stream)
            frames = container.decode(stream)
        else:
            frames = itertools.chain([first], frames)
    for number, frame in enumerate(frames):
        seconds = _seconds(frame, number, stream)
        if seconds >= stop:
            return
        if seconds >= start:
            yield seconds, _upright(frame)


def _seconds(frame: av.VideoFrame, number: int, stream: av.VideoStream) -> float:
    ticks = frame.pts if frame.pts is not None else frame.dts
    if ticks is not None and frame.time_base:
        return float(ticks * frame.time_base)
    return number / float(stream.average_rate or 1)


def _upright(frame: av.VideoFrame) -> np.ndarray:
    pixels = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4  # counter-clockwise, from the display matrix
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return text[:1].lower() + text[1:]
