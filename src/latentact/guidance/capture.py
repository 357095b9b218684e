"""Frames of a live demonstration: a camera, or a video file at its own rate, read by a separate thread."""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from latentact.errors import UserError
from latentact.guidance.extractor import LatentActionExtractor, video_frames
from latentact.robots.connection import one_line
from latentact.robots.setup import make_camera

log = logging.getLogger(__name__)

QUEUE = 16
"""Frames that wait for the LAM; older ones are dropped."""
LOST_S = 1.0
"""Seconds without a frame after which a camera is lost."""
EARLY = 0.25
"""How much a frame may precede its time, in periods."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Frame:
    """One frame of a live demonstration."""

    number: int
    """Its time in periods of the guide's rate, rounded; a number may be missing."""
    time: float
    """When it was captured, on the monotonic clock."""
    pixels: UInt8[np.ndarray, "h w 3"]


@runtime_checkable
class FrameSource(Protocol):
    """What `Capture` reads."""

    name: str
    """As the user wrote it."""
    fps: float
    """Frames per second that are used."""
    endless: bool
    """Whether it has no end, so that a missing frame is an error."""
    captured: int
    """Frames read so far, used or not."""

    def frames(self) -> Iterator[Frame]:
        """Yield each frame when it is captured."""
        ...

    def close(self) -> None:
        """Release the device."""
        ...


class VideoSource:
    """A video file, played at its own rate; the same frames as those of a guide extracted from it.

    Args:
        path: the file.
        fps: frames per second that are used, at most those of the file.
    """

    endless = False

    def __init__(self, path: str, fps: float) -> None:
        self.name, self.fps, self.captured = path, fps, 0

    def frames(self) -> Iterator[Frame]:
        """Yield each frame at its time; the first one at once.

        Raises:
            UserError: the file is damaged.
        """
        start = time.monotonic()
        for number, pixels in enumerate(video_frames(self.name, self.fps)):
            time.sleep(max(0.0, start + number / self.fps - time.monotonic()))
            self.captured += 1
            yield Frame(number=number, time=time.monotonic(), pixels=pixels)

    def close(self) -> None:
        """Do nothing; the reader closes the file."""


class CameraSource:
    """A LeRobot camera, of whose frames those nearest to the guide's rate are used.

    Args:
        name: as the user wrote it.
        camera: connected.
        fps: frames per second that are used.
    """

    endless = True

    def __init__(self, name: str, camera: Any, fps: float) -> None:
        self.name, self.fps, self.captured, self._camera = name, fps, 0, camera

    def frames(self) -> Iterator[Frame]:
        """Yield the first frame at or shortly before each multiple of a period, until the camera fails."""
        start, last = math.nan, -1
        while True:
            pixels = self._camera.async_read(timeout_ms=1000 * LOST_S)
            now, self.captured = time.monotonic(), self.captured + 1
            if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
                raise UserError(
                    f"the camera {self.name} must return uint8 [h, w, 3], got {pixels.dtype} "
                    f"{list(pixels.shape)}. Choose a color camera."
                )
            if self.captured == 1:
                start = now
            number = math.floor((now - start) * self.fps + EARLY)
            if number > last:
                # the two clocks differ a little: follow the camera's
                start += 0.1 * ((now - start) - number / self.fps)
                last = number
                yield Frame(number=number, time=now, pixels=pixels)

    def close(self) -> None:
        """Disconnect."""
        if self._camera.is_connected:
            self._camera.disconnect()


def open_source(text: str, extractor: LatentActionExtractor, target_fps: float = 0.0) -> FrameSource:
    """Return the source of frames for a LAM, connected if it is a camera.

    Args:
        text: a video file, or a camera as of `make_camera`.
        extractor: of the LAM.
        target_fps: frames per second; 0: the LAM's training rate, or the source's own if that is unknown.

    Raises:
        UserError: there is no such file or camera, or it is too slow.
    """
    kind = text.partition(":")[0]
    if Path(text).exists() or not kind.isidentifier() or kind == text:
        return VideoSource(text, extractor.video_fps(text, target_fps))
    camera = make_camera(text)
    try:
        camera.connect()
    except Exception as error:  # a driver raises anything
        raise UserError(
            f"the camera {text} cannot be used: {one_line(error).rstrip('.')}. Check its connection and "
            "settings."
        ) from error
    own = float(camera.fps or 0)
    source = CameraSource(text, camera, target_fps or extractor.model.spec.fps or own)
    try:
        extractor.require_rate(source.fps, own or source.fps, text)
    except UserError:
        source.close()
        raise
    return source


class Capture:
    """Read a source on a separate thread into a bounded queue, whose oldest frames are dropped.

    Reading starts with the first `take`.

    Args:
        source: source of the frames.
        max_frames: frames after which it ends; 0: no limit.
    """

    def __init__(self, source: FrameSource, max_frames: int = 0) -> None:
        self.source, self.dropped = source, 0
        self._max_frames = max_frames or None
        self._queue: deque[Frame] = deque()
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._read, name="camera", daemon=True)
        self._finished = self._closing = False
        self._last = math.inf

    def take(self, timeout: float) -> list[Frame] | None:
        """Return the frames since the last call, in order; waits for one, at most `timeout` seconds.

        Returns:
            None when the source has ended and all frames were returned.

        Raises:
            UserError: the camera is lost, or the file is damaged, and all frames before that were returned.
        """
        if self._thread.ident is None:
            self._last = time.monotonic()
            self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._finished, timeout)
            frames, finished = [*self._queue], self._finished
            self._queue.clear()
        if frames:
            return frames
        if not finished:
            if self.source.endless and time.monotonic() - self._last > LOST_S:
                raise self._lost(f"no frame for {LOST_S:g} s")
            return []
        if isinstance(self._error, UserError):
            raise self._error
        if self._error is not None:
            raise self._lost(one_line(self._error).rstrip(".")) from self._error
        return None

    def close(self) -> None:
        """Stop reading and release the device; waits a few seconds for its driver."""
        self._closing = True
        if self._thread.ident is None:
            self.source.close()
            return
        self._thread.join(timeout=5 * LOST_S)
        if self._thread.is_alive():
            log.warning("the camera %s does not respond and was not closed", self.source.name)

    def _read(self) -> None:
        try:
            for frame in itertools.islice(self.source.frames(), self._max_frames):
                with self._changed:
                    self._last = frame.time
                    self._queue.append(frame)
                    if len(self._queue) > QUEUE:
                        self._queue.popleft()
                        self.dropped += 1
                    self._changed.notify()
                if self._closing:
                    break
        except BaseException as error:  # raised by `take` in the other thread
            self._error = error
        with self._changed:
            self._finished = True
            self._changed.notify()
        with suppress(Exception):  # a lost camera cannot be closed
            self.source.close()

    def _lost(self, why: str) -> UserError:
        return UserError(
            f"the camera {self.source.name} was lost ({why}), so control stopped. Check its connection, then "
            "re-run the command."
        )
