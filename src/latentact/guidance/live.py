"""Inference with a live guide: a policy follows a camera, with the latent actions of frames as they arrive.

A latent action exists once the last frame of its transition was captured. A policy that also reads those of
the next timesteps therefore follows later, by its largest offset. Each control step waits up to half a period
for the latent action it needs; if several are new, it continues with the newest.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, UInt8

from latentact.data.time_base import rates_agree
from latentact.errors import UserError
from latentact.guidance.capture import Capture, Frame
from latentact.guidance.extractor import LatentActionExtractor
from latentact.guidance.guide import LINE, Guide
from latentact.guidance.inference import TOKENS, LatentGuidedInference
from latentact.robots.safety import UnsafeActionError, UnsafeReason

STAGES = ("capture_to_latent", "latent_to_action", "capture_to_action")


@dataclass(frozen=True, kw_only=True, eq=False)
class LiveLatent:
    """The latent action of one transition."""

    number: int
    """Number of the frame that starts it."""
    vectors: Float32[np.ndarray, "k d"]
    continuous: Float32[np.ndarray, "k d"]
    codes: np.ndarray | None
    captured: float
    """When the frame that ends it was captured, on the monotonic clock."""
    extracted: float
    """When it was computed."""


class StreamingExtractor:
    """Turn each new frame into the latent action of the transition that ends with it.

    The values are those of `LatentActionExtractor` for the same frames. A transition with a missing frame has
    none; missing context is treated as context before the video.

    Args:
        extractor: extractor of the LAM's latent actions.
        fps: frames per second.
    """

    def __init__(self, extractor: LatentActionExtractor, fps: float) -> None:
        self._extractor, self._context = extractor, extractor.model.context
        self.gap = extractor.gap(fps)
        self._held: dict[int, np.ndarray] = {}  # the frames of the next windows, by number
        self.still: np.ndarray | None = None
        """Vectors and continuous latent action of the first frame twice, `[2, k, d]`."""
        self.newest: UInt8[np.ndarray, "h w 3"] | None = None
        """The newest frame, at the extractor's resolution."""

    def push(self, frame: Frame) -> LiveLatent | None:
        """Return the latent action of the transition that ends with a frame; None if its start is missing."""
        self.newest = pixels = self._extractor.resized(frame.pixels)
        if self.still is None:
            window, valid = [pixels] * (self._context + 2), [False] * self._context + [True, True]
            self.still = np.concatenate(self._encode(window, valid)[:2])
        self._held[frame.number] = pixels
        numbers = [frame.number + k * self.gap for k in range(-self._context - 1, 1)]
        self._held = {n: held for n, held in self._held.items() if n >= numbers[0]}
        if numbers[-2] not in self._held:
            return None
        missing = [n for n in numbers if n not in self._held]
        first = max(missing, default=-math.inf)  # what is older than a missing frame is not used either
        padding = self._held[min(self._held)]
        window = [self._held.get(n, padding) for n in numbers]
        vectors, continuous, codes = self._encode(window, [n > first for n in numbers])
        return LiveLatent(
            number=numbers[-2],
            vectors=vectors[0],
            continuous=continuous[0],
            codes=None if codes is None else codes[0],
            captured=frame.time,
            extracted=time.monotonic(),
        )

    def _encode(
        self, window: list[np.ndarray], valid: list[bool]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        return self._extractor.encode_last(np.stack(window)[None], np.array([valid]))


def blank_guide(extractor: LatentActionExtractor, fps: float) -> Guide:
    """Return the guide of black frames, with the spec and rate of a live one, to check a policy with it."""
    size = extractor.resolution or extractor.model.spec.resolution
    return extractor.extract_from_frames(np.zeros((extractor.gap(fps) + 1, size, size, 3), np.uint8), fps)


class LiveInference:
    """An agent that follows a live guide in one episode, one robot action per step.

    Args:
        inference: the agent, checked with the `blank_guide` of the same LAM and rate.
        extractor: extractor of the LAM's latent actions.
        capture: frames of the demonstration, at the rate of that guide.
        max_age_s: age in seconds above which a frame is stale; 0: two periods of the guide.
    """

    def __init__(
        self,
        inference: LatentGuidedInference,
        extractor: LatentActionExtractor,
        capture: Capture,
        max_age_s: float = 0.0,
    ) -> None:
        self.agent, self.fps = inference.agent, inference.fps
        self._inference, self._capture = inference, capture
        self._blank = inference.guide
        self._stream = StreamingExtractor(extractor, self._blank.fps)
        self.max_age_s = max_age_s or 2 / self._blank.fps
        same = rates_agree(self.fps, self._blank.fps)
        self._per_step = 1.0 if same else self._blank.fps / self.fps
        self._last_ahead = int(inference.ahead.max())
        self._latents: list[LiveLatent] = []
        self._numbers: list[int] = []
        self._latencies: dict[str, list[float]] = {stage: [] for stage in STAGES}
        self._step = 0  # next control step of the guide, which waits for its latent actions
        self._due: float | None = None
        self._started = self._over = False
        self._acted_on = 0  # latent actions when the last action was computed
        self._stale = self._skipped = self._late = 0
        self.ended = False
        """Whether all of the demonstration, which has ended, was followed."""
        self.error: UserError | None = None
        """Why the camera was lost."""
        self.position: list[int] = []
        """Index in `guide` of each control step."""

    @property
    def control_steps(self) -> int:
        """Return 0: the demonstration ends when the camera does."""
        return 0

    @property
    def startup_s(self) -> float:
        """Seconds of video before the first action."""
        return (self._stream.gap + self._entry(self._last_ahead)) / self._blank.fps

    @property
    def newest_frame(self) -> UInt8[np.ndarray, "h w 3"] | None:
        """The newest frame, at the extractor's resolution."""
        return self._stream.newest

    @property
    def guide(self) -> Guide | None:
        """The latent actions so far; None if there are none."""
        if not self._latents:
            return None
        codes = [latent.codes for latent in self._latents if latent.codes is not None]
        return replace(
            self._blank,
            vectors=np.stack([latent.vectors for latent in self._latents]),
            continuous=np.stack([latent.continuous for latent in self._latents]),
            codes=np.stack(codes) if codes else None,
            still=self._stream.still,
            provenance=(f"live {self._capture.source.name}, {self._capture.dropped} frames dropped"[:LINE],),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the entry `live` of `metrics.json`; latencies in milliseconds."""
        source = self._capture.source
        live = {
            "camera": source.name,
            "fps": self._blank.fps,
            "captured": source.captured,
            "dropped": self._capture.dropped,
            "stale_steps": self._stale,
            "skipped_steps": self._skipped,
            "late_steps": None if self._due is None else self._late,
            "max_age_s": self.max_age_s,
            "delay_s": self._last_ahead / self.fps,
            "latency_ms": {stage: _quantiles(values) for stage, values in self._latencies.items()},
        }
        return {"live": live}

    def warm_up(self, observation: dict[str, Any]) -> None:
        """Predict one action for an unbatched observation without a frame of the demonstration."""
        self._inference.warm_up(observation)

    def reset(self, num_envs: int = 1) -> None:
        """Start an episode; the demonstration starts with the first action."""
        self.agent.reset(num_envs)

    def predict_action(self, observation: dict[str, Any]) -> np.ndarray | None:
        """Return the robot action for an unbatched observation; None at the end of the demonstration.

        Raises:
            UnsafeActionError: there is no latent action yet, or the newest frame is stale.
            UserError: the camera is lost.
        """
        tokens = self._next()
        if self.ended:
            return None
        if tokens is None:
            age = f"the newest ended {self._age():.2f} s ago" if self._started else "the video has just begun"
            raise UnsafeActionError(UnsafeReason.GUIDE, age)
        batch = self._inference.prepare_batch(observation, torch.from_numpy(tokens))
        return self._act(batch, batch.pop(TOKENS))

    def act(self, observation: dict[str, Any]) -> list[np.ndarray | None]:
        """Return the action for a batch of size one in real time, as an `Actor`; None ends the episode.

        While the newest frame is stale, an agent that was trained for it acts without a guide; another one
        repeats the last latent actions.
        """
        agent = self.agent
        if self._due is None:  # the first call of a policy is slow: before the demonstration starts
            agent.act(observation, self._inference.get_next_latent_action()[None].numpy())  # type: ignore[index]
            agent.reset(1)
        try:
            self._wait_until_due()
            tokens = self._next()
            while tokens is None and not self._started:
                tokens = self._next()
        except UserError as error:
            self.error = error
            return [None]
        if self.ended:
            return [None]
        self._due = (time.monotonic() if self._due is None else self._due) + 1 / self.fps
        latent = agent.spec.latent
        if tokens is None and not (latent and latent.optional):
            tokens = self._tokens(max(0, self._step - 1))
        return [self._act(observation, None if tokens is None else tokens[None])]

    def _act(self, observation: dict[str, Any], tokens: np.ndarray | None) -> np.ndarray:
        action = np.asarray(self.agent.act(observation, tokens)[0])
        self.position.append(self._index(self._entry(max(0, self._step - 1))))
        if tokens is not None and len(self._latents) > self._acted_on:
            self._acted_on, newest, now = len(self._latents), self._latents[-1], time.monotonic()
            self._latencies["latent_to_action"].append(now - newest.extracted)
            self._latencies["capture_to_action"].append(now - newest.captured)
        return action

    def _next(self) -> Float32[np.ndarray, "o f"] | None:
        """Return the tokens of the next control step, after waiting up to half a period for them.

        Returns:
            None at the end, before the first latent actions, and while the newest frame is stale.
        """
        deadline, needed = time.monotonic() + 0.5 / self.fps, self._entry(self._step + self._last_ahead)
        self._receive(0.0)
        while not self._over and self._newest < needed and (left := deadline - time.monotonic()) > 0:
            self._receive(left)
        if self._over:
            self._started = True
            self.ended = self._step >= math.ceil((self._newest + 1) / self._per_step - 1e-6)
            if self.ended:
                return None
        else:
            self._started |= self._newest >= needed
            if not self._started:
                return None
            if self._age() > self.max_age_s:
                self._stale += 1
                return None
            if self._newest < needed:  # this one is late: repeat the last ones
                return self._tokens(self._step - 1)
            ahead = self._newest - (self._step + self._last_ahead) * self._per_step
            if ahead >= 1 - 1e-6:
                skip = int(ahead / self._per_step + 1e-6)
                self._step, self._skipped = self._step + skip, self._skipped + skip
        self._step += 1
        return self._tokens(self._step - 1)

    def _receive(self, timeout: float) -> None:
        """Extract the latent actions of new frames, after waiting for one.

        Raises:
            UserError: the camera is lost, or the source ended before the first latent action.
        """
        frames = self._capture.take(timeout)
        self._over = frames is None
        if self._over and not self._latents:
            raise UserError(
                f"{self._capture.source.name} must have at least {self._stream.gap + 1} frames, got "
                f"{self._capture.source.captured}. Record a longer demonstration, or raise --target-fps."
            )
        for frame in frames or ():
            latent = self._stream.push(frame)
            if latent is not None:
                self._latents.append(latent)
                self._numbers.append(latent.number)
                self._latencies["capture_to_latent"].append(latent.extracted - latent.captured)

    def _wait_until_due(self) -> None:
        if self._due is None:
            return
        if (now := time.monotonic()) > self._due:
            self._due, self._late = now, self._late + 1  # no burst of steps to catch up
        while (left := self._due - time.monotonic()) > 0:
            if self._over:
                time.sleep(left)
            else:
                self._receive(left)

    @property
    def _newest(self) -> int:
        return self._numbers[-1] if self._numbers else -1

    def _age(self) -> float:
        return time.monotonic() - self._latents[-1].captured

    def _entry(self, step: int) -> int:
        """Return the number of the latent action at a control step."""
        return math.floor(step * self._per_step + 1e-6)

    def _index(self, number: int) -> int:
        """Return the index of a latent action or, if it is missing, of the one before it."""
        return max(0, bisect_right(self._numbers, number) - 1)

    def _tokens(self, step: int) -> Float32[np.ndarray, "o f"]:
        """Return the tokens of a control step; the newest latent action also stands for those after it."""
        kind = self.agent.spec.latent.kind  # type: ignore[union-attr]  # checked by `inference`
        rows = [self._latents[self._index(self._entry(step + int(a)))] for a in self._inference.ahead]
        return np.stack([getattr(row, kind).ravel() for row in rows]).astype(np.float32)


def _quantiles(seconds: list[float]) -> dict[str, float] | None:
    """Return p50, p95 and max in milliseconds; None without values."""
    if not seconds:
        return None
    p50, p95 = np.percentile(seconds, (50, 95))
    return {"p50": 1000 * float(p50), "p95": 1000 * float(p95), "max": 1000 * max(seconds)}
