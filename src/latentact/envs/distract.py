"""Distractors: a moving background and a shaking camera, correlated with the action, and random colors.

Motion that the robot does not cause misleads latent action models, in particular when it correlates with the
action (LAOM, arXiv 2502.00379). Here both motions are generated, known and recorded: at correlation 0 they
are noise, at 1 the action determines them. Random colors per episode (domain randomization, arXiv 1703.06907)
prepare a policy for environments that look different.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from latentact.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

NUISANCE = ("background_x", "background_y", "shake_x", "shake_y")
"""Recorded state: the displacement of both, in image widths."""
DRIFT = 0.02  # standard deviation of the background's motion per step, in image widths
SHAKE = 0.06  # standard deviation of the camera's displacement at strength 1, in image widths
SHAKE_LIMIT = 0.08  # largest displacement of the camera, so that no object leaves the image entirely
WAVES = 5  # number of waves per color in the background
WAVES_PER_WIDTH = 4  # frequency of the finest wave
SMOOTH = 0.8  # autocorrelation of the noise in the background's motion
DARKEST = 0.25  # intensity of a white background at strength 1
BRIGHTNESS = 0.4  # at appearance 1 the image is up to this much brighter or darker
TINT = 0.3  # at appearance 1 each color is up to this much stronger or weaker
REPAINT = 0.6  # at appearance 1 the background has up to this share of a random color


@dataclass(frozen=True, kw_only=True)
class Distraction:
    """Strength of the distractors and their correlation with the action; all 0: none."""

    background: float = 0.0
    """Contrast of the moving background, from 0 to 1."""
    shake: float = 0.0
    """Strength of the camera's shake, from 0 to 1."""
    correlation: float = 0.0
    """Correlation of both motions with the action, from 0 to 1."""
    appearance: float = 0.0
    """Strength of the random brightness, tint and background color of each episode, from 0 to 1."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        for field in fields(self):
            if not 0 <= getattr(self, field.name) <= 1:
                value = getattr(self, field.name)
                raise UserError(
                    f"distractor {field.name} must be between 0 and 1, got {value:g}. Choose a strength in "
                    f"this range, as in {field.name}=0.5."
                )

    def __bool__(self) -> bool:
        """Whether there are distractors."""
        return self.moves or bool(self.appearance)

    @property
    def moves(self) -> bool:
        """Whether something moves, whose state is recorded."""
        return bool(self.background or self.shake)

    @property
    def settings(self) -> dict[str, float]:
        """The settings as they are stored; those added later only where they are set."""
        return {name: value for name, value in vars(self).items() if value or name != "appearance"}

    @classmethod
    def parse(cls, text: str) -> Distraction:
        """Parse ``background=0.5,shake=0.3,correlation=0.8``; empty: no distractors.

        Raises:
            UserError: a name is unknown, or a value is not between 0 and 1.
        """
        known, found = [field.name for field in fields(cls)], {}
        for part in filter(None, text.split(",")):
            name, value = (word.strip() for word in part.partition("=")[::2])
            if name not in known:
                raise UserError(f"unknown distractor {name!r}{did_you_mean(name, known)}")
            if name in found:
                raise UserError(f"distractor {name} must be given once, got {text!r}. Remove one.")
            try:
                found[name] = float(value)
            except ValueError as error:
                raise UserError(
                    f"distractor {name} must be between 0 and 1, got {value!r}. Give a number, "
                    f"as in {name}=0.5."
                ) from error
        distraction = cls(**found)
        if text and not distraction:
            raise UserError(
                f"distractors must include background, shake or appearance, got {text!r}. Give one, as in "
                "background=0.5."
            )
        return distraction


def directions(count: int) -> Float[np.ndarray, "n 2"]:
    """Return a direction for each of some discrete actions: evenly spaced, unit variance on either axis."""
    angles = 2 * np.pi * np.arange(count) / count
    return np.sqrt(2) * np.stack([np.cos(angles), np.sin(angles)], 1)


class Distractor:
    """The distractors of one episode.

    Args:
        distraction: their strength.
        seed: of the background's texture and of both motions.
    """

    def __init__(self, distraction: Distraction, seed: int | None) -> None:
        self._distraction = distraction
        self._rng = np.random.default_rng(None if seed is None else (seed, 2))
        self._waves = self._rng.integers(-WAVES_PER_WIDTH, WAVES_PER_WIDTH + 1, (3, WAVES, 2))
        self._phases = self._rng.uniform(0, 2 * np.pi, (3, WAVES))
        self._noise = np.zeros(2)
        self._background, self._shake = np.zeros(2), np.zeros(2)
        looks = np.random.default_rng(None if seed is None else (seed, 3)).uniform(-1, 1, 8)
        looks = looks * distraction.appearance
        self._gains = (1 + BRIGHTNESS * looks[0]) * (1 + TINT * looks[1:4])
        self._paint, self._color = REPAINT * abs(looks[4]), 127.5 * (1 + looks[5:])

    @property
    def nuisance(self) -> Float[np.ndarray, "4"]:
        """The values of `NUISANCE`."""
        return np.concatenate([self._background, self._shake]).astype(np.float32)

    def step(self, heading: Float[np.ndarray, "2"]) -> None:
        """Advance both motions by one step.

        Args:
            heading: direction of the action, about unit length on either axis.
        """
        part, rest = self._distraction.correlation, np.sqrt(1 - self._distraction.correlation**2)
        fresh, jerk = self._rng.normal(size=(2, 2))
        self._noise = SMOOTH * self._noise + np.sqrt(1 - SMOOTH**2) * fresh
        heading = np.clip(heading, -3, 3)
        if self._distraction.background:
            self._background = self._background + DRIFT * (part * heading + rest * self._noise)
        if self._distraction.shake:
            offset = SHAKE * self._distraction.shake * (part * heading + rest * jerk)
            self._shake = np.clip(offset, -SHAKE_LIMIT, SHAKE_LIMIT)

    def draw(
        self, frame: UInt8[np.ndarray, "h w 3"], floor: Float[np.ndarray, "h w"] | None
    ) -> UInt8[np.ndarray, "h w 3"]:
        """Return the frame with other colors, the background at opacity `floor` (0 to 1), and displaced."""
        if self._distraction.appearance:
            frame = self._recolored(frame, floor)
        if self._distraction.background and floor is not None:
            frame = self._on_floor(frame, floor)
        if not self._distraction.shake:
            return frame
        height, width = frame.shape[:2]
        x, y = np.round(self._shake * width).astype(int)
        rows, columns = (np.clip(np.arange(n) - by, 0, n - 1) for n, by in ((height, y), (width, x)))
        return frame[rows][:, columns]

    def _recolored(self, frame: np.ndarray, floor: np.ndarray | None) -> np.ndarray:
        mixed = frame.astype(np.float32)
        if floor is not None:
            mixed += self._paint * floor[..., None] * (self._color.astype(np.float32) - mixed)
        return (mixed * self._gains.astype(np.float32)).round().clip(0, 255).astype(np.uint8)

    def _on_floor(self, frame: np.ndarray, floor: np.ndarray) -> np.ndarray:
        height, width = frame.shape[:2]
        x, y = np.arange(width) / width, np.arange(height) / width
        across, down = x - self._background[0], y - self._background[1]
        angle = self._waves[..., :1, None] * across + self._waves[..., 1:, None] * down[:, None]
        waves = np.sin(2 * np.pi * angle + self._phases[..., None, None]).mean(1)
        texture = np.moveaxis(0.5 + 0.5 * np.tanh(2 * waves), 0, -1) * self._distraction.background
        bright = frame.astype(np.float32) / 255
        painted = np.where(bright > 0.5, bright * (1 - (1 - DARKEST) * texture), bright + 0.6 * texture)
        mixed = bright + floor[..., None] * (painted - bright)
        return (mixed * 255).round().clip(0, 255).astype(np.uint8)
