"""Distractors: a moving background and a shaking camera that follow the agent's action as far as one wants.

What moves without being moved by the robot is what latent action models get lost in, the more so where it
correlates with the action (LAOM, arXiv 2502.00379). Here both motions are drawn, known and recorded: at
correlation 0 they are noise, at 1 the action decides them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from latentact.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

NUISANCE = ("background_x", "background_y", "shake_x", "shake_y")
"""What is recorded: how far both have moved, in widths of the picture."""
DRIFT = 0.02  # deviation of the background's motion per step, in widths of the picture
SHAKE = 0.06  # deviation of the camera's place at strength 1, in widths of the picture
SHAKE_LIMIT = 0.08  # the camera's largest distance from its place, so that nothing leaves the picture whole
WAVES = 5  # per color, of which the background is made
WAVES_PER_WIDTH = 4  # of the finest
SMOOTH = 0.8  # how much of the noise in the background's motion stays from step to step
DARKEST = 0.25  # of a white background at strength 1; a black one is lit up to 1 - DARKEST


@dataclass(frozen=True, kw_only=True)
class Distraction:
    """Strength of the distractors, and how they go with the action; all 0: none."""

    background: float = 0.0
    """Contrast of the moving background, 0 to 1."""
    shake: float = 0.0
    """Strength of the camera's shake, 0 to 1."""
    correlation: float = 0.0
    """Share of the action in both motions: 0 independent of it, 1 decided by it."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        for field in fields(self):
            if not 0 <= getattr(self, field.name) <= 1:
                value = getattr(self, field.name)
                raise UserError(f"distractor {field.name} is {value:g}; wanted a number from 0 to 1.")

    def __bool__(self) -> bool:
        """Whether anything distracts."""
        return bool(self.background or self.shake)

    @classmethod
    def parse(cls, said: str) -> Distraction:
        """Read ``background=0.5,shake=0.3,correlation=0.8``; empty: no distractors.

        Raises:
            UserError: an unknown name, or not a number from 0 to 1.
        """
        known, found = [field.name for field in fields(cls)], {}
        for part in filter(None, said.split(",")):
            name, value = (word.strip() for word in part.partition("=")[::2])
            if name not in known:
                raise UserError(f"unknown distractor {name!r}{did_you_mean(name, known)}")
            if name in found:
                raise UserError(f"distractor {name} is given twice in {said!r}; give it once.")
            try:
                found[name] = float(value)
            except ValueError as error:
                raise UserError(
                    f"distractor {name} is {value!r}; wanted a number from 0 to 1, as in {name}=0.5."
                ) from error
        distraction = cls(**found)
        if said and not distraction:
            raise UserError(f"{said!r} distracts nothing; give background or shake, as in background=0.5.")
        return distraction


class Distractor:
    """The distractors of one episode.

    Args:
        distraction: how strong.
        seed: of the background's look and of both motions.
    """

    def __init__(self, distraction: Distraction, seed: int | None) -> None:
        self._wanted = distraction
        self._rng = np.random.default_rng(None if seed is None else (seed, 2))
        self._waves = self._rng.integers(-WAVES_PER_WIDTH, WAVES_PER_WIDTH + 1, (3, WAVES, 2))
        self._phases = self._rng.uniform(0, 2 * np.pi, (3, WAVES))
        self._noise = np.zeros(2)
        self._background, self._shake = np.zeros(2), np.zeros(2)

    @property
    def nuisance(self) -> Float[np.ndarray, "4"]:
        """The numbers of `NUISANCE`."""
        return np.concatenate([self._background, self._shake]).astype(np.float32)

    def step(self, heading: Float[np.ndarray, "2"]) -> None:
        """Move on.

        Args:
            heading: where the action goes, about one in size on either axis.
        """
        share, rest = self._wanted.correlation, np.sqrt(1 - self._wanted.correlation**2)
        fresh, jerk = self._rng.normal(size=(2, 2))
        self._noise = SMOOTH * self._noise + np.sqrt(1 - SMOOTH**2) * fresh
        heading = np.clip(heading, -3, 3)
        if self._wanted.background:
            self._background = self._background + DRIFT * (share * heading + rest * self._noise)
        if self._wanted.shake:
            place = SHAKE * self._wanted.shake * (share * heading + rest * jerk)
            self._shake = np.clip(place, -SHAKE_LIMIT, SHAKE_LIMIT)

    def draw(
        self, frame: UInt8[np.ndarray, "h w 3"], floor: Float[np.ndarray, "h w"] | None
    ) -> UInt8[np.ndarray, "h w 3"]:
        """Return the frame with the background where `floor` is (0 nowhere, 1 fully), seen by the camera."""
        if self._wanted.background and floor is not None:
            frame = self._on_floor(frame, floor)
        if not self._wanted.shake:
            return frame
        height, width = frame.shape[:2]
        x, y = np.round(self._shake * width).astype(int)
        rows, columns = (np.clip(np.arange(n) - by, 0, n - 1) for n, by in ((height, y), (width, x)))
        return frame[rows][:, columns]

    def _on_floor(self, frame: np.ndarray, floor: np.ndarray) -> np.ndarray:
        height, width = frame.shape[:2]
        x, y = np.arange(width) / width, np.arange(height) / width
        across, down = x - self._background[0], y - self._background[1]
        angle = self._waves[..., :1, None] * across + self._waves[..., 1:, None] * down[:, None]
        waves = np.sin(2 * np.pi * angle + self._phases[..., None, None]).mean(1)
        texture = np.moveaxis(0.5 + 0.5 * np.tanh(2 * waves), 0, -1) * self._wanted.background
        bright = frame.astype(np.float32) / 255
        painted = np.where(bright > 0.5, bright * (1 - (1 - DARKEST) * texture), bright + 0.6 * texture)
        mixed = bright + floor[..., None] * (painted - bright)
        return (mixed * 255).round().clip(0, 255).astype(np.uint8)
