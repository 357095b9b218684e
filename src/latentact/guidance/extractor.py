"""Extract the guide of a demonstration video: the latent actions of its frames."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float32, UInt8
from torch import Tensor

from latentact.data.decode.resize import resize
from latentact.data.decode.video import VideoInfo, decode, probe
from latentact.data.format import Unreadable
from latentact.data.time_base import at_times, lam_frame_gap, rates_agree
from latentact.device import select_device
from latentact.errors import UserError
from latentact.guidance.guide import Guide
from latentact.guidance.inference import BATCH
from latentact.lams.contract import load_lam, states_message
from latentact.progress import Progress


class LatentActionExtractor:
    """Extract the guide of a demonstration with a frozen LAM of any kind.

    Args:
        lam_model_path: folder, file or hub id of the LAM.
        lam_resolution: height and width to which frames are resized before the LAM, which then resizes them
            to its own resolution; 0: unchanged.
        device: cpu, cuda or mps; None: the fastest available.
    """

    def __init__(
        self, lam_model_path: str | Path, lam_resolution: int = 224, device: str | None = None
    ) -> None:
        device = select_device(device or "auto")
        if lam_resolution < 0:
            raise UserError(
                f"lam_resolution must be at least 0, got {lam_resolution}. Give the size in pixels, or 0 for "
                "the video's own."
            )
        self.model = load_lam(lam_model_path, device)
        self.resolution, self.device = lam_resolution, device
        self.loaded_fps: float | None = None
        """Frame rate of the last loaded video, the default of `extract_from_frames`."""

    def load_video(
        self, video_path: str | Path, target_fps: float | None = None, max_frames: int | None = None
    ) -> UInt8[np.ndarray, "t h w 3"]:
        """Return a video's frames at `target_fps`, resized to the extractor's resolution.

        Args:
            video_path: any video; its timestamps and rotation are applied.
            target_fps: frames per second; None or 0: the LAM's training rate, or the video's own if that is
                unknown.
            max_frames: maximum number of frames; None or 0: all.

        Raises:
            UserError: the file is not a video, is damaged, or has fewer frames per second than requested.
        """
        fps = self.video_fps(video_path, target_fps)
        frames = [*self._resized(video_frames(video_path, fps, max_frames))]
        self.loaded_fps = fps
        return np.stack(frames)

    def extract(
        self, video_path: str | Path, target_fps: float | None = None, max_frames: int | None = None
    ) -> Guide:
        """Return the guide of a video with a bounded number of frames in memory; see `load_video`."""
        fps, info = self.video_fps(video_path, target_fps), _probe(Path(video_path))
        total = min(max_frames or sys.maxsize, round(info.frames * fps / info.fps))
        with Progress("extracting latent actions", total, "frames") as progress:
            frames = _counted(video_frames(video_path, fps, max_frames), progress)
            return self._encode(frames, fps, source=str(video_path))

    def extract_from_frames(
        self,
        frames: np.ndarray | Tensor,
        fps: float | None = None,
        states: Float32[np.ndarray, "t s"] | None = None,
    ) -> Guide:
        """Return the guide of frames already in memory.

        Args:
            frames: uint8 0..255, `[t, h, w, 3]` as numpy or `[t, 3, h, w]` as torch.
            fps: frames per second; None: of the video loaded last, or else of the LAM's training data.
            states: robot state of every frame, for a LAM that uses it.

        Raises:
            UserError: there are too few frames, they are not uint8, or the LAM's gap is not a whole number
                of frames at that rate.
        """
        if isinstance(frames, Tensor):
            frames = frames.permute(0, 2, 3, 1).numpy(force=True)
        if frames.ndim != 4 or frames.dtype != np.uint8 or frames.shape[3] != 3:
            raise UserError(
                f"frames must be uint8 [t, h, w, 3], got {frames.dtype} {list(frames.shape)}. Convert them "
                "to values from 0 to 255."
            )
        if states is not None and len(states) != len(frames):
            raise UserError(f"states must have a row for each of {len(frames)} frames, got {len(states)}.")
        rate = fps or self.loaded_fps or self.model.spec.fps
        return self._encode(frames, rate, states)

    def video_fps(self, video_path: str | Path, target_fps: float | None) -> float:
        """Return the rate at which a video is read; see `load_video`."""
        info = _probe(Path(video_path))
        fps = target_fps or self.model.spec.fps or info.fps
        self.require_rate(fps, info.fps, str(video_path))
        return fps

    def require_rate(self, fps: float, own: float, source: str) -> None:
        """Raise a UserError unless the LAM can read a source, which has `own` frames per second, at `fps`."""
        if self.model.state_size:
            raise UserError(states_message(self.model.spec, self.model.state_size, 0, source))
        if fps < 0 or not own:
            raise UserError(
                f"{source} must have a rate above 0, got {own:g} frames per second and target_fps "
                f"{fps:g}. Set --target-fps."
            )
        self.gap(fps)
        if fps > own and not rates_agree(fps, own):
            raise UserError(
                f"{source} must have at least {fps:g} frames per second, got {own:g}. Record the "
                f"demonstration at that rate, or give --target-fps {own:g}."
            )

    def gap(self, fps: float) -> int:
        """Return the LAM's gap in frames at `fps`; UserError if it is not close to a whole number."""
        spec = self.model.spec
        rate = spec.fps or 1 / (spec.frame_gap_s or 1)
        remedy = f"Give a rate that fits, for example --target-fps {rate:g}."
        return lam_frame_gap(spec, fps, "the demonstration", remedy=remedy)

    def _resized(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        return map(self.resized, frames)

    def resized(self, frame: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h2 w2 3"]:
        """Return a frame at the extractor's resolution."""
        return resize(frame[None], self.resolution, self.model.spec.resize)[0]

    def _encode(
        self,
        frames: Iterable[np.ndarray],
        fps: float,
        states: np.ndarray | None = None,
        source: str = "frames",
    ) -> Guide:
        """Encode a stream of frames in the same windows as labeling, and its first frame as no change."""
        spec, context = self.model.spec, self.model.context
        gap = self.gap(fps)
        held: list[np.ndarray] = []  # frames from number `first` on
        first = done = total = 0
        parts: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]] = []
        still: tuple[np.ndarray, ...] = ()
        for frame in itertools.chain(self._resized(frames), (None,)):
            if frame is not None:
                held.append(frame)
                total += 1
            ready = max(0, total - gap)
            if ready - done < BATCH and not (frame is None and ready > done):
                continue
            if not parts:
                rest = None if states is None else states[:1].repeat(gap + 1, axis=0)
                still = self._window(np.stack(held[:1] * (gap + 1)), np.zeros(1, int), 0, gap, rest)[:2]
            parts.append(self._window(np.stack(held), np.arange(done, ready), first, gap, states))
            done = ready
            held = held[max(0, done - context * gap) - first :]
            first = max(0, done - context * gap)
        if not parts:
            raise UserError(
                f"the demonstration must have at least {gap + 1} frames, got {total}. Record a longer "
                "demonstration, or raise --target-fps."
            )
        vectors, continuous, codes = zip(*parts, strict=True)
        codebook = None if codes[0] is None else self.model.codebook()
        known = replace(spec, frame_gap=gap, frame_gap_s=gap / fps, fps=fps) if fps else spec
        return Guide(
            spec=known,
            fps=fps,
            vectors=np.concatenate(vectors),
            continuous=np.concatenate(continuous),
            codes=None if codes[0] is None else np.concatenate(codes),
            codebook=None if codebook is None else codebook.float().numpy(force=True),
            still=np.concatenate(still),
            provenance=(f"extract {source}".encode(errors="backslashreplace").decode()[:1000],),
        )

    def _window(
        self, held: np.ndarray, rows: np.ndarray, first: int, gap: int, states: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        # index spaces: `rows` and `window` count frames of the video, `held` starts at its frame `first`
        window = rows[:, None] + np.arange(-self.model.context, 2) * gap
        inside = np.maximum(window, 0)
        kept_states = None if states is None else states[inside].astype(np.float32)
        return self.encode_last(held[inside - first], window == inside, kept_states)

    @torch.inference_mode()
    def encode_last(
        self,
        frames: UInt8[np.ndarray, "b t h w 3"],
        valid: Bool[np.ndarray, "b t"],
        states: Float32[np.ndarray, "b t s"] | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Return vectors and continuous `[b, k, d]` and codes `[b, k]` of the last transition of windows.

        Args:
            frames: `context` older frames, the two of the transition.
            valid: False for frames before the video.
            states: robot state of every frame, for a LAM that uses it.
        """
        found = self.model.encode(
            torch.from_numpy(frames).permute(0, 1, 4, 2, 3).to(self.device),
            torch.from_numpy(valid).to(self.device),
            last=True,
            states=None if states is None else torch.from_numpy(states).to(self.device),
        )
        codes = None if found.codes is None else found.codes[:, -1].numpy(force=True)
        return found.vectors[:, -1].numpy(force=True), found.continuous[:, -1].numpy(force=True), codes


def video_frames(
    path: str | Path, fps: float, max_frames: int | None = None
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Yield a video's frames at `fps`, starting with its first frame, upright and at their own size.

    Raises:
        UserError: the file is not a video or is damaged.
    """
    frames = decode(Path(path))
    try:
        start = next(frames)
        picked = at_times(itertools.chain([start], frames), (start[0] + k / fps for k in itertools.count()))
        for _, _, frame in itertools.islice(picked, max_frames or None):
            yield frame
    except StopIteration as error:
        raise UserError(f"{path} must have at least one frame, got none. Record the video again.") from error
    except Unreadable as error:
        raise UserError(f"{path} cannot be read: {error}. Give an undamaged video.") from error


def _counted[T](items: Iterable[T], progress: Progress) -> Iterator[T]:
    for item in items:
        yield item
        progress.advance(1)


def _probe(path: Path) -> VideoInfo:
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise UserError(f"{path} must be a video file, got {found}. Check the path.")
    try:
        return probe(path)
    except Unreadable as error:
        raise UserError(f"{path} cannot be read: {error}. Give an undamaged video.") from error
