"""Augmentation of training batches: one draw per clip, the same for all of its frames; never of targets.

The random shift is DrQ's (arXiv 2004.13649): pixels from outside the image repeat its edge. Brightness,
contrast and saturation are torchvision's, with one rounding at the end. All random numbers come from the
generator that the caller seeds, so that a resumed training repeats them. There are no flips or rotations,
because they change the meaning of an action.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from latentact.config import Between, Fraction, check_bounds
from latentact.data.samples import PolicyBatch
from latentact.types import Clip

GRAY = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in a gray value, ITU-R 601."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Augmentation of the observations in training; everything is off by default."""

    shift: Annotated[int, Between(0, 256)] = 0
    """Maximum random shift in pixels of the training frames, in each direction (DrQ: 4 of 84)."""
    brightness: Fraction = 0.0
    """Brightness is multiplied by 1 - brightness to 1 + brightness."""
    contrast: Fraction = 0.0
    """The distance to the clip's mean gray is multiplied by 1 - contrast to 1 + contrast."""
    saturation: Fraction = 0.0
    """The distance to each pixel's gray is multiplied by 1 - saturation to 1 + saturation."""
    blur: Fraction = 0.0
    """Maximum weight of the image blurred over 3 x 3 pixels."""
    cutout: Fraction = 0.0
    """Maximum side of a gray square at a random position, as a fraction of the image's side."""
    state_noise: Annotated[float, Between(0, 10)] = 0.0
    """Standard deviation of noise on the robot state, in standard deviations of the state in the data."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        check_bounds(self, "augment.")

    def __str__(self) -> str:
        """The settings that are on, e.g. "shift=4"."""
        return " ".join(f"{name}={value:g}" for name, value in vars(self).items() if value) or "none"

    @property
    def frames(self) -> bool:
        """Whether frames are augmented."""
        return any(value for name, value in vars(self).items() if name != "state_noise")

    @property
    def inputs(self) -> set[str]:
        """What is augmented: frames, state, both or nothing."""
        return {name for name, on in (("frames", self.frames), ("state", self.state_noise)) if on}


def augment_batch[B: (Clip, PolicyBatch)](
    batch: B, config: AugmentConfig, rng: np.random.Generator, state_std: Tensor | None = None
) -> B:
    """Return a batch with augmented observations and the same targets.

    The frames of a policy are all inputs. Those of a clip are inputs of inverse dynamics and targets of
    forward dynamics: the augmented ones are added as `observed`, and noise on the state as `state_noise`.

    Args:
        batch: training batch.
        config: strength of each augmentation.
        rng: the only source of randomness.
        state_std: policies: standard deviations of the state in the data.
    """
    frames = augment_frames(batch.frames, config, rng) if config.frames else None
    noise = None
    if config.state_noise and (state := batch.state) is not None:
        noise = config.state_noise * _tensor(rng.standard_normal(state.shape), state)
    if isinstance(batch, Clip):
        return replace(batch, observed=frames, state_noise=noise)
    state = batch.state
    if noise is not None and state is not None and state_std is not None:
        state = state + noise * state_std.to(state)
    return replace(batch, frames=batch.frames if frames is None else frames, state=state)


def augment_frames(
    frames: UInt8[Tensor, "b t c h w"], config: AugmentConfig, rng: np.random.Generator
) -> UInt8[Tensor, "b t c h w"]:
    """Return augmented clips, with one draw per clip."""
    x = frames.permute(0, 1, 3, 4, 2)  # as the cache stores them
    if config.shift:
        x = _shifted(x, rng.integers(-config.shift, config.shift + 1, (len(x), 2)))
    spreads = np.array([config.brightness, config.contrast, config.saturation])
    if config.blur or spreads.any():
        mixed = _blurred(x, config.blur * rng.random(len(x))) if config.blur else x.float()
        if spreads.any():
            with torch.autocast(x.device.type, enabled=False):
                mixed = _recolored(mixed, 1 + spreads * rng.uniform(-1, 1, (len(x), 3)))
        x = mixed.round_().clamp_(0, 255).to(torch.uint8)
    if config.cutout:
        x = _cut_out(x, config.cutout * rng.random(len(x)), rng.random((len(x), 2)))
    return x.permute(0, 1, 4, 2, 3)


def _shifted(x: UInt8[Tensor, "b t h w c"], shifts: np.ndarray) -> UInt8[Tensor, "b t h w c"]:
    """Return clips shifted up and to the left by integers ``[b, 2]``."""
    pad, (h, w) = int(np.abs(shifts).max(initial=0)), x.shape[2:4]
    corners = zip(_padded(x, pad), (shifts + pad).tolist(), strict=True)
    return torch.stack([clip[:, top : top + h, left : left + w] for clip, (top, left) in corners])


def _padded(x: Tensor, pad: int) -> Tensor:
    """Return clips ``[b, t, h, w, c]`` whose edge repeats by some pixels on every side."""
    for axis in (3, 2):
        first, last = x.narrow(axis, 0, 1), x.narrow(axis, x.shape[axis] - 1, 1)
        repeated = [-1] * axis + [pad] + [-1] * (4 - axis)
        x = torch.cat([first.expand(repeated), x, last.expand(repeated)], axis)
    return x


def _blurred(x: UInt8[Tensor, "b t h w c"], weights: np.ndarray) -> Float[Tensor, "b t h w c"]:
    """Return clips mixed with their 1-2-1 average, by weights ``[b]``."""
    smooth = _padded(x, 1).float()
    for axis in (2, 3, 2, 3):
        size = smooth.shape[axis] - 1
        smooth = smooth.narrow(axis, 0, size) + smooth.narrow(axis, 1, size)
    weight = _tensor(weights, smooth).view(-1, 1, 1, 1, 1)
    return smooth.mul_(weight / 16).addcmul_(x, 1 - weight)


def _recolored(x: Float[Tensor, "b t h w c"], factors: np.ndarray) -> Float[Tensor, "b t h w c"]:
    """Return clips times their factors of brightness, contrast and saturation ``[b, 3]``."""
    channels, pixels = x.shape[4], x.flatten(1, 3)
    gray = pixels @ x.new_tensor(GRAY if channels == 3 else [1 / channels] * channels)
    brightness, contrast, saturation = _tensor(factors.T[..., None], x)
    mean = gray.mean(1, keepdim=True)
    rest = gray.mul_((1 - saturation) * contrast).add_((1 - contrast) * mean).mul_(brightness)
    factor = (saturation * contrast * brightness)[..., None]
    return torch.addcmul(rest[..., None], pixels, factor).view(x.shape)


def _cut_out(x: UInt8[Tensor, "b t h w c"], sides: np.ndarray, places: np.ndarray) -> Tensor:
    """Return clips with a gray square of sides ``[b]`` around places ``[b, 2]``, all in 0..1."""
    x, size = x.clone(), np.array(x.shape[2:4])
    low = np.rint((places - sides[:, None] / 2) * size).clip(0, size).astype(int).tolist()
    high = np.rint((places + sides[:, None] / 2) * size).clip(0, size).astype(int).tolist()
    for clip, (top, left), (bottom, right) in zip(x, low, high, strict=True):
        clip[:, top:bottom, left:right] = 128
    return x


def _tensor(values: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(like.device, torch.float32)
