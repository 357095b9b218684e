"""Write one episode as a draft: its scenes, split into clips, as tar members in their final form.

A draft depends on the episode and the settings only. Shards are concatenated drafts, byte for byte.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image
from pydantic import Field

from latentact.data.decode.pipeline import DecodeSpec, episode_chunks
from latentact.data.format import Unreadable
from latentact.data.scenes import SIZE, SceneCuts
from latentact.data.tars import Range, ShardClip, ShardEpisode, tar_member, write_record
from latentact.data.time_base import at_times
from latentact.io.atomic import atomic_write
from latentact.io.records import Record

CODECS = ("jpeg", "png", "mp4")
_STILL_LEVELS = 0.5
"""Mean change in gray levels below which a frame counts as still."""
_REGULAR_S = 1e-6


@dataclass(frozen=True, kw_only=True)
class ClipSettings:
    """Settings for splitting an episode into clips."""

    codec: str
    """One of `CODECS`."""
    quality: int
    """JPEG quality, 1 to 100."""
    clip_frames: int
    """Maximum frames per clip."""
    min_frames: int
    """Minimum frames per scene."""
    cuts: bool
    """Whether to find scene cuts."""
    still_s: float
    """Minimum duration of a dropped still span, in seconds; 0: none is dropped."""
    duplicates: bool
    """Whether episodes get a digest, for finding duplicates."""


class Draft(Record):
    """Content of a draft: the tar's clips, with offsets in the draft's own tar."""

    episode: ShardEpisode
    clips: tuple[ShardClip, ...] = Field(strict=False)
    spans: tuple[Range, ...] = Field(strict=False)
    """Offset and size of the contiguous members of each clip."""


@dataclass
class DraftWriter:
    """Write drafts; called from several threads at once, each for a different episode."""

    spec: DecodeSpec
    settings: ClipSettings
    folder: Path

    def write(self, number: int) -> Draft:
        """Write `NUMBER.tar` and then `NUMBER.json`, which lists its content.

        Raises:
            Unreadable: the episode is damaged.
            OSError: the disk is full.
        """
        about = self.spec.source.episodes[number]
        found: dict[str, Any] = {"number": number, "name": about.name}
        try:
            scan = _Scan.of(self.spec, self.settings, number)
            with atomic_write(self.folder / f"{number:06d}.tar") as partial, partial.open("wb") as file:
                clips = _Clips(self, number, file)
                frames = clips.write(scan)
            if not frames:
                raise Unreadable("it has no frames")
        except Unreadable as error:
            (self.folder / f"{number:06d}.tar").unlink(missing_ok=True)
            draft = Draft(episode=ShardEpisode(**found, unreadable=str(error)), clips=(), spans=())
        else:
            found |= {"frames": frames, "still": clips.still, "short": clips.short}
            if scan is not None:
                found |= {"cuts": scan.cuts, "digest": scan.digest if self.settings.duplicates else ""}
            draft = Draft(episode=ShardEpisode(**found), clips=tuple(clips.clips), spans=tuple(clips.spans))
        write_record(self.folder / f"{number:06d}.json", draft)
        return draft

    @cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """Robot actions and states of all rows, if the data has them."""
        found = {
            "action": self.spec.source.column("action"),
            "state": self.spec.source.column("observation.state"),
        }
        return {name: values for name, values in found.items() if values is not None}


@dataclass
class _Scan:
    """Result of a first pass over an episode."""

    cuts: list[int]
    """Frames that start a scene, before resampling."""
    still: list[Range]
    """First frame, and last + 1, of spans to drop, before resampling."""
    digest: str
    kept: np.ndarray
    """Index of each frame before resampling."""

    @classmethod
    def of(cls, spec: DecodeSpec, settings: ClipSettings, number: int) -> _Scan | None:
        """Scan an episode; None if the settings need no scan."""
        if not settings.cuts and not settings.still_s and not settings.duplicates:
            return None
        cuts, digest, last = SceneCuts(), hashlib.blake2b(digest_size=16), None
        times: list[float] = []
        moving: list[bool] = []  # entry t: whether frame t differs from frame t - 1
        for chunk in episode_chunks(replace(spec, fps=0.0, resolution=SIZE, resize="uint8"), number):
            if settings.cuts:
                cuts.add(chunk.frames)
            digest.update(np.ascontiguousarray(chunk.frames))
            whole = chunk.frames if last is None else np.concatenate([last[None], chunk.frames])
            change = np.abs(np.diff(whole.astype(np.int16), axis=0)).mean((1, 2, 3))
            moving += [True] * (last is None) + (change >= _STILL_LEVELS).tolist()
            times += chunk.times
            last = chunk.frames[-1]
        kept = np.arange(len(times))
        if spec.fps:
            every = (k / spec.fps for k in count())
            kept = np.array([n for _, n, _ in at_times(((t, n) for n, t in enumerate(times)), every)])
        return cls(
            cuts=cuts.finish() if settings.cuts else [],
            still=_still_spans(moving, times, settings.still_s) if settings.still_s else [],
            digest=digest.hexdigest(),
            kept=kept,
        )

    def scenes(self) -> list[Range]:
        """Return the first frame, and last + 1, of each scene without its still spans."""
        frames = len(self.kept)
        dropped = np.zeros(frames + 1, bool)
        for span in self.still:
            begin, end = np.searchsorted(self.kept, span)
            dropped[begin:end] = True
        dropped[-1] = True
        cuts = {*np.searchsorted(self.kept, self.cuts).tolist()}
        scenes, start = [], None
        for t in range(frames + 1):
            if start is not None and (dropped[t] or t in cuts):
                scenes.append((start, t))
                start = None
            if start is None and not dropped[t]:
                start = t
        return scenes


def _still_spans(moving: list[bool], times: list[float], seconds: float) -> list[Range]:
    """Return the frames of still spans to drop: all that equal the previous frame."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], ~np.array(moving, bool), [0]]).astype(np.int8)))
    spans = [(int(begin), int(end)) for begin, end in edges.reshape(-1, 2)]
    return [(begin, end) for begin, end in spans if times[end - 1] - times[begin - 1] >= seconds]


@dataclass
class _Clips:
    """Splits an episode into clips and writes their members."""

    writer: DraftWriter
    number: int
    file: BinaryIO
    clips: list[ShardClip] = field(default_factory=list)
    spans: list[Range] = field(default_factory=list)
    still: int = 0
    short: int = 0

    def write(self, scan: _Scan | None) -> int:
        """Write all clips; return the number of frames of the episode."""
        settings, frames = self.writer.settings, 0
        scenes = None if scan is None else scan.scenes()
        held: list[tuple[float, int, np.ndarray]] = []
        texts = self._texts()
        scene = first = 0
        place = 0
        for seconds, index, frame in self._frames():
            t, frames = frames, frames + 1
            if scenes is not None:
                while place < len(scenes) and t >= scenes[place][1]:
                    first += self._flush(held, scene, first, texts)
                    place, scene, first = place + 1, scene + (1 if self._long(scenes[place]) else 0), 0
                if place == len(scenes) or t < scenes[place][0]:
                    self.still += 1
                    continue
                if not self._long(scenes[place]):
                    self.short += 1
                    continue
            other = bool(held) and (texts(held[-1][1]) != texts(index) or held[-1][2].shape != frame.shape)
            if len(held) == settings.clip_frames or other:
                first += self._flush(held, scene, first, texts)
            held.append((seconds, index, frame))
        self._flush(held, scene, first, texts)
        if scan is None and frames < settings.min_frames:
            self.clips, self.spans, self.short = [], [], frames
        return frames

    def _long(self, scene: Range) -> bool:
        return scene[1] - scene[0] >= self.writer.settings.min_frames

    def _frames(self) -> Iterator[tuple[float, int, np.ndarray]]:
        for chunk in episode_chunks(self.writer.spec, self.number):
            yield from zip(chunk.times, chunk.frame_indices, chunk.frames, strict=True)

    def _texts(self) -> Any:
        source = self.writer.spec.source
        tasks = source.row_tasks(self.number)

        def text(index: int) -> str:
            task = int(tasks[min(index, len(tasks) - 1)])
            return source.tasks[task] if task >= 0 else ""

        return text

    def _flush(self, held: list[tuple[float, int, np.ndarray]], scene: int, first: int, texts: Any) -> int:
        """Write the buffered frames as a clip and clear the buffer; return their number."""
        if not held:
            return 0
        times, indices, frames = zip(*held, strict=True)
        spec, settings = self.writer.spec, self.writer.settings
        key = f"ep{self.number:06d}_s{scene:04d}_c{len(self.clips):05d}"
        fps = spec.fps or spec.source.fps
        within = np.array(times) - times[0]
        regular = bool((np.abs(within - np.arange(len(times)) / fps) <= _REGULAR_S).all())
        about = {
            "source": spec.source.episodes[self.number].name,
            "episode": self.number,
            "scene": scene,
            "first": first,
            "start_s": times[0],
            "fps": fps,
            "times": None if regular else within.tolist(),
            "text": texts(indices[0]),
            "width": frames[0].shape[1],
            "height": frames[0].shape[0],
        }
        begin = self.file.tell()
        self._member(f"{key}.json", json.dumps(about | {"frames": len(times)}).encode())
        found: dict[str, Any] = {}
        rows = spec.source.first_rows[self.number] + np.array(indices)
        for name, values in self.writer.columns.items():
            buffer = io.BytesIO()
            np.save(buffer, values[rows])
            found[name] = self._member(f"{key}.{name}.npy", buffer.getvalue())
        if settings.codec == "mp4":
            found["video"] = self._member(f"{key}.mp4", _encode_video(frames, fps))
        else:
            ending = {"jpeg": "jpg", "png": "png"}[settings.codec]
            images = [_encode_image(frame, settings) for frame in frames]
            ranges = [self._member(f"{key}.{n:04d}.{ending}", data) for n, data in enumerate(images)]
            found["offsets"], found["sizes"] = zip(*ranges, strict=True)
        self.clips.append(ShardClip(key=key, count=len(times), **about, **found))
        self.spans.append((begin, self.file.tell() - begin))
        held.clear()
        return len(times)

    def _member(self, name: str, data: bytes) -> Range:
        whole = tar_member(name, data)
        offset = self.file.tell() + 512
        self.file.write(whole)
        return offset, len(data)


def _encode_image(frame: UInt8[np.ndarray, "h w c"], settings: ClipSettings) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(frame[..., 0] if frame.shape[2] == 1 else frame)
    if settings.codec == "png":
        image.save(buffer, "PNG", compress_level=4)
    else:
        image.save(buffer, "JPEG", quality=settings.quality)
    return buffer.getvalue()


def _encode_video(frames: tuple[UInt8[np.ndarray, "h w c"], ...], fps: float) -> bytes:
    """Return frames as H.264, with one thread, so that the bytes do not depend on the machine's cores."""
    buffer = io.BytesIO()
    height, width = frames[0].shape[:2]
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream(
            "libx264", Fraction(fps).limit_denominator(1000), options={"crf": "18", "threads": "1"}
        )
        stream.height, stream.width = height, width
        stream.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
        for frame in frames:
            rgb = np.ascontiguousarray(np.broadcast_to(frame, (height, width, 3)))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()
