"""Video files: what is in them, and their frames with times, as FFmpeg's command line decodes them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import av.logging
import numpy as np
from av.error import FFmpegError
from jaxtyping import Float64, UInt8

from latentact.data.decode.color import Converter, display_matrix
from latentact.data.format import Unreadable
from latentact.data.time_base import FrameClock, FrameRate, frame_rate

if TYPE_CHECKING:
    from av.container import InputContainer

SUFFIXES = frozenset(
    {
        ".mp4",
        ".m4v",
        ".mov",
        ".mkv",
        ".webm",
        ".avi",
        ".gif",
        ".apng",
        ".mpg",
        ".mpeg",
        ".ts",
        ".m2ts",
        ".mts",
    }
    | {".wmv", ".flv", ".ogv", ".3gp"}
)
"""Endings of video files, lower case."""


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a video file holds."""

    frames: int
    """Number of frames that a player shows; a few codecs hide some that only decoding finds."""
    rate: FrameRate
    """How fast they follow each other."""

    @property
    def fps(self) -> float:
        """Frames per second; 0 when there is a single frame and the file names no rate."""
        return self.rate.fps


@dataclass(frozen=True, kw_only=True)
class VideoLook:
    """What one looks at before using a video; `check-data` shows it."""

    codec: str
    pixel_format: str
    width: int
    """Pixels, as stored."""
    height: int
    matrix: str
    """Color matrix that the stream names; empty: none, which means BT.601."""
    orientation: tuple[int, int, int, int]
    """Signs of the display matrix; (1, 0, 0, 1): shown as stored."""
    streams: int
    """Video streams in the file."""


def probe(path: Path) -> VideoInfo:
    """Return what a video file holds, from its packets, without decoding them.

    Raises:
        Unreadable: it is not a video, or it is cut short.
    """
    try:
        with closing(_open(path)) as container:
            return _probe(container, path)
    except (FFmpegError, OSError, ValueError) as error:
        raise Unreadable(_reason(error)) from error


def frame_times(path: Path) -> Float64[np.ndarray, " n"]:
    """Return the seconds at which a video's frames are shown, ascending, from its packets.

    Raises:
        Unreadable: it is not a video.
    """
    try:
        with closing(_open(path)) as container:
            stream = _video_stream(container)
            return _times([p for p in container.demux(stream) if p.size and not p.is_discard], stream)
    except (FFmpegError, OSError, ValueError) as error:
        raise Unreadable(_reason(error)) from error


def look(path: Path) -> VideoLook:
    """Return codec, size, color and orientation of a video, from its first frame.

    Raises:
        Unreadable: it is not a video, or its first frame cannot be decoded.
    """
    try:
        with closing(_open(path)) as container:
            stream = _video_stream(container)
            frame = next(container.decode(stream), None)
            if frame is None:
                raise Unreadable("it has no frames")
            return VideoLook(
                codec=stream.codec_context.name,
                pixel_format=frame.format.name,
                width=frame.width,
                height=frame.height,
                matrix=_MATRIX_NAMES.get(int(frame.colorspace), ""),
                orientation=display_matrix(frame),
                streams=len(container.streams.video),
            )
    except (FFmpegError, OSError, ValueError) as error:
        raise Unreadable(_reason(error)) from error


_MATRIX_NAMES = {
    0: "RGB",
    1: "BT.709",
    4: "FCC",
    5: "BT.601",
    6: "BT.601",
    7: "SMPTE 240M",
    9: "BT.2020",
    10: "BT.2020",
}


def decode(
    path: Path, start: float = -math.inf, stop: float = math.inf
) -> Iterator[tuple[float, UInt8[np.ndarray, "h w 3"]]]:
    """Yield (seconds, upright RGB frame) for the frames of a video with start <= seconds < stop, in order.

    Of several video streams the one that FFmpeg and players choose is decoded.

    Raises:
        Unreadable: it is not a video, or damaged.
    """
    convert = Converter()
    try:
        with _open(path) as container:
            for seconds, frame in _frames(container, start, stop):
                yield seconds, convert(frame)
    except (FFmpegError, OSError, ValueError) as error:
        raise Unreadable(_reason(error)) from error


def _open(path: Path, **options: str) -> InputContainer:
    """Open a video; quietly each time, because lerobot's writers switch FFmpeg's own messages back on."""
    av.logging.set_level(None)
    try:
        name = str(path).encode().decode()
    except UnicodeEncodeError:  # PyAV takes UTF-8 names only
        return av.open(path.open("rb"), "r", options=options)
    return av.open(name if name.startswith("/") else f"./{name}", "r", options=options)


def _video_stream(container: InputContainer) -> av.VideoStream:
    stream: Any = container.streams.best("video")
    if stream is None:
        raise Unreadable("it has no video stream")
    if stream.codec_context is None:  # decoding it all the same would end the process
        raise Unreadable("its codec is not known; encode it again, with H.264 for example")
    return stream


def _probe(container: InputContainer, path: Path) -> VideoInfo:
    stream = _video_stream(container)
    base = stream.time_base or 1
    packets = [p for p in container.demux(stream) if p.size]
    shown = [p for p in packets if not p.is_discard]
    if not shown:
        raise Unreadable("it has no frames")
    if len(packets) < stream.frames:  # an edit list may hide some; without it all of them must be there
        with closing(_open(path, ignore_editlist="1")) as whole:
            there = sum(1 for p in whole.demux(_video_stream(whole)) if p.size)
        if there < stream.frames:
            raise Unreadable(f"it is cut short: {there} of its {stream.frames} frames are there")
    times = _times(shown, stream)
    rate = frame_rate(times, _named_rate(stream))
    if len(container.streams) == 1 and container.duration and rate.fps:  # Matroska names no number of frames
        last = max(shown, key=lambda p: p.pts or p.dts or 0)
        lasts = float((last.duration or 0) * base) or 1 / rate.fps
        named = container.duration / av.time_base  # from 0, wherever the first frame lies
        if len(times) and times[-1] + lasts < named - max(0.5, 3 / rate.fps):
            raise Unreadable(f"it is cut short: {times[-1] + lasts:.1f} of its {named:.1f} seconds are there")
    return VideoInfo(frames=len(shown), rate=rate)


def _named_rate(stream: av.VideoStream) -> float:
    """Return the frames per second that FFmpeg counts with where frames have no times; 0: none."""
    return float(stream.guessed_rate or stream.average_rate or 0)


def _times(packets: list[av.Packet], stream: av.VideoStream) -> Float64[np.ndarray, " n"]:
    ticks = [p.pts if p.pts is not None else p.dts for p in packets]
    known = np.sort(np.array([tick for tick in ticks if tick is not None], np.float64))
    return (
        known
        if stream.time_base is None
        else known * stream.time_base.numerator / stream.time_base.denominator
    )


def _frames(container: InputContainer, start: float, stop: float) -> Iterator[tuple[float, av.VideoFrame]]:
    stream = _video_stream(container)
    frames: Iterator[av.VideoFrame] = container.decode(stream)
    if start > 0 and stream.time_base:
        container.seek(int(start / stream.time_base), stream=stream)
        first = next(frames, None)
        if first is None or (_seconds(first) or 0.0) > start:
            # Seeking goes by decoding time, so with reordered frames it can land late: start over.
            container.seek(0, stream=stream)
            frames = container.decode(stream)
        else:
            frames = itertools.chain([first], frames)
    clock = FrameClock(_named_rate(stream))
    for frame in frames:
        seconds = clock(_seconds(frame))
        if seconds >= stop:
            return
        if seconds >= start:
            yield seconds, frame


def _seconds(frame: av.VideoFrame) -> float | None:
    ticks = frame.pts if frame.pts is not None else frame.dts
    return None if ticks is None or not frame.time_base else float(ticks * frame.time_base)


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return text[:1].lower() + text[1:]
