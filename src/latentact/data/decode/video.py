"""Probe and decode video files; frames and timestamps equal those of the FFmpeg command line."""

from __future__ import annotations

import io
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
        ".3gp",
        ".apng",
        ".avi",
        ".flv",
        ".gif",
        ".m2ts",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".ogv",
        ".ts",
        ".webm",
        ".wmv",
    }
)
"""Suffixes of video files, lower case."""


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """Number and rate of the frames of a video file."""

    frames: int
    """Number of displayed frames, from the packets; a few codecs decode to fewer."""
    rate: FrameRate
    """Frame rate and its variation."""

    @property
    def fps(self) -> float:
        """Frames per second; 0 for a single frame in a file without a rate."""
        return self.rate.fps


@dataclass(frozen=True, kw_only=True)
class VideoProperties:
    """Codec, size, color and orientation of a video, for `check-data`."""

    codec: str
    pixel_format: str
    width: int
    """Stored width in pixels."""
    height: int
    """Stored height in pixels."""
    matrix: str
    """Color matrix of the stream; empty: unspecified, decoded as BT.601."""
    orientation: tuple[int, int, int, int]
    """Signs (a, b, c, d) of the display matrix; (1, 0, 0, 1) is the identity."""
    streams: int
    """Number of video streams in the file."""
    first: bool
    """Whether FFmpeg chooses the first of them; the chosen stream is read."""


def probe(path: Path | bytes) -> VideoInfo:
    """Return the number and rate of the frames of a video file, or of its bytes, without decoding.

    Raises:
        Unreadable: the file is not a video or is truncated.
    """
    try:
        with closing(_open(path)) as container:
            return _probe(container, path)
    except (FFmpegError, OSError, ValueError) as error:
        raise Unreadable(_reason(error)) from error


def frame_times(path: Path) -> Float64[np.ndarray, " n"]:
    """Return the presentation times of a video's frames in seconds, ascending, from its packets.

    Raises:
        Unreadable: the file is not a video.
    """
    try:
        with closing(_open(path)) as container:
            stream = _video_stream(container)
            return _times([p for p in container.demux(stream) if p.size and not p.is_discard], stream)
    except (FFmpegError, OSError, ValueError) as error:
        raise Unreadable(_reason(error)) from error


def video_properties(path: Path) -> VideoProperties:
    """Return codec, size, color and orientation of a video, from its first frame.

    Raises:
        Unreadable: the file is not a video, or its first frame cannot be decoded.
    """
    try:
        with closing(_open(path)) as container:
            stream = _video_stream(container)
            frame = next(container.decode(stream), None)
            if frame is None:
                raise Unreadable("it has no frames")
            return VideoProperties(
                codec=stream.codec_context.name,
                pixel_format=frame.format.name,
                width=frame.width,
                height=frame.height,
                matrix=_MATRIX_NAMES.get(int(frame.colorspace), ""),
                orientation=display_matrix(frame),
                streams=len(container.streams.video),
                first=stream.index == container.streams.video[0].index,
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
    path: Path | bytes, start: float = -math.inf, stop: float = math.inf
) -> Iterator[tuple[float, UInt8[np.ndarray, "h w 3"]]]:
    """Yield (seconds, upright RGB frame 0..255) for the frames with start <= seconds < stop, in order.

    Of several video streams, decodes the one that FFmpeg selects.

    Args:
        path: video file, or its bytes.
        start: first time in seconds.
        stop: end of the span in seconds, exclusive.

    Raises:
        Unreadable: the file is not a video or is damaged.
    """
    convert = Converter()
    try:
        with _open(path) as container:
            for seconds, frame in _frames(container, start, stop):
                yield seconds, convert(frame)
    except (FFmpegError, OSError, ValueError) as error:
        raise Unreadable(_reason(error)) from error


def _open(path: Path | bytes, **options: str) -> InputContainer:
    """Open a video; silences FFmpeg each time because the writers of lerobot turn its log back on."""
    av.logging.set_level(None)
    if isinstance(path, bytes):
        return av.open(io.BytesIO(path), "r", options=options)
    try:
        name = str(path).encode().decode()
    except UnicodeEncodeError:  # PyAV accepts only UTF-8 names
        return av.open(path.open("rb"), "r", options=options)
    return av.open(name if name.startswith("/") else f"./{name}", "r", options=options)


def _video_stream(container: InputContainer) -> av.VideoStream:
    stream: Any = container.streams.best("video")
    if stream is None:
        raise Unreadable("it has no video stream")
    if stream.codec_context is None:  # decoding would crash the process
        raise Unreadable("its codec is unknown; encode it again, for example with H.264")
    return stream


def _probe(container: InputContainer, path: Path | bytes) -> VideoInfo:
    stream = _video_stream(container)
    base = stream.time_base or 1
    packets = [p for p in container.demux(stream) if p.size]
    shown = [p for p in packets if not p.is_discard]
    if not shown:
        raise Unreadable("it has no frames")
    if len(packets) < stream.frames:  # frames may be hidden by an edit list; count again without it
        with closing(_open(path, ignore_editlist="1")) as unedited:
            present = sum(1 for p in unedited.demux(_video_stream(unedited)) if p.size)
        if present < stream.frames:
            raise Unreadable(f"it is truncated: {present} of {stream.frames} frames are present")
    times = _times(shown, stream)
    rate = frame_rate(times, _stream_rate(stream))
    if len(container.streams) == 1 and container.duration and rate.fps:  # Matroska stores no frame count
        last = max(shown, key=lambda p: p.pts or p.dts or 0)
        end = times[-1] + (float((last.duration or 0) * base) or 1 / rate.fps) if len(times) else math.inf
        duration = container.duration / av.time_base  # from 0, whatever the time of the first frame
        if end < duration - max(0.5, 3 / rate.fps):
            raise Unreadable(f"it is truncated: {end:.1f} of {duration:.1f} seconds are present")
    return VideoInfo(frames=len(shown), rate=rate)


def _stream_rate(stream: av.VideoStream) -> float:
    """Return the frames per second that FFmpeg assumes for frames without timestamps; 0: unknown."""
    return float(stream.guessed_rate or stream.average_rate or 0)


def _times(packets: list[av.Packet], stream: av.VideoStream) -> Float64[np.ndarray, " n"]:
    """Return the presentation times of packets in seconds, ascending."""
    ticks = [p.pts if p.pts is not None else p.dts for p in packets]
    known = np.sort(np.array([tick for tick in ticks if tick is not None], np.float64))
    if stream.time_base is None:
        return known
    return known * stream.time_base.numerator / stream.time_base.denominator


def _frames(container: InputContainer, start: float, stop: float) -> Iterator[tuple[float, av.VideoFrame]]:
    stream = _video_stream(container)
    frames: Iterator[av.VideoFrame] = container.decode(stream)
    if start > 0 and stream.time_base:
        container.seek(int(start / stream.time_base), stream=stream)
        first = next(frames, None)
        if first is None or (_seconds(first) or 0.0) > start:
            # Seeking uses decoding times, so it can overshoot if frames are reordered: start over.
            container.seek(0, stream=stream)
            frames = container.decode(stream)
        else:
            frames = itertools.chain([first], frames)
    clock = FrameClock(_stream_rate(stream))
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
