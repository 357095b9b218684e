"""Convert the frames of any environment, from `render()` or image observations, to RGB."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from latentact.envs.spec import EnvError

if TYPE_CHECKING:
    from jaxtyping import Shaped, UInt8

SMALLEST_FRAME = 16
"""Height and width in pixels below which an observation is an encoding, such as MiniGrid's 7x7x3."""
ROUNDING = 1e-3
"""Tolerance of float intensities outside 0..1."""


def to_rgb(value: Any, source: str, white: float | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """Return a copy of a frame as RGB, 0..255.

    Args:
        value: array, tensor or PIL image `[h, w]`, `[h, w, c]` or `[c, h, w]` with c = 1 (gray), 3 (RGB) or 4
            (RGBA, whose alpha is dropped); of a list or a fourth axis of frames, the last frame is used.
            Integers are 0..255, floats 0..1 or 0..255, booleans black and white.
        source: origin of the frame, for messages.
        white: value of white in floats, the upper bound of the observation space; None: 1, or 255 if a float
            is larger.

    Raises:
        EnvError: it is not an image.
    """
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.shape[2:] == (3,) and value.size:
        return value.copy()
    frame = _array(value)
    if frame is not None and frame.ndim == 4 and len(frame):
        frame = frame[-1]
    frame = None if frame is None or not frame.size else _channels_last(frame)
    if frame is None:
        raise EnvError(
            f"{source} must return an image (gray, RGB or RGBA, channels first or last), "
            f"got {_described(value)}. Wrap the environment so that it does."
        )
    low, high = float(frame.min()), float(frame.max())
    unit = frame.dtype.kind == "f" and (white or high) <= 1 + ROUNDING
    scale = 255 if frame.dtype.kind == "b" or unit else 1
    if not (low >= -ROUNDING and high <= 255):  # also where either is NaN
        raise EnvError(
            f"{source} must return values from 0 to 255, or floats from 0 to 1, got {low:g} to {high:g}. "
            "Wrap the environment to convert it."
        )
    frame = (frame * np.float64(scale)).round().clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(frame[..., :3], (*frame.shape[:2], 3)))


def is_image(space: Any) -> bool:
    """Return whether a Gymnasium space holds frames for `to_rgb`: a Box `[h, w]`, `[h, w, c]` or `[c, h, w]`.

    Its values must be uint8 or, with channels, bounded by 0..1 or 0..255. Frame stacks `[4, h, w]` are not
    images.
    """
    shape, low, high = (getattr(space, name, None) for name in ("shape", "low", "high"))
    if shape is None or low is None or high is None or len(shape) not in (2, 3):
        return False
    size = shape if len(shape) == 2 else shape[:2] if shape[2] in (1, 3, 4) else shape[1:]
    if len(shape) == 3 and shape[2] not in (1, 3, 4) and shape[0] not in (1, 3):
        return False
    bounded = len(shape) == 3 and bool((low == 0).all()) and bool((high == 1).all() or (high == 255).all())
    return min(size) >= SMALLEST_FRAME and (space.dtype == np.uint8 or bounded)


def _array(value: Any) -> Shaped[np.ndarray, "..."] | None:
    """Return a numeric array; None if it cannot be converted."""
    if isinstance(value, list | tuple) and value and not isinstance(value[-1], list | tuple):
        return _array(value[-1])
    data: Any = value
    if hasattr(data, "detach"):  # a torch tensor
        data = data.detach().cpu()
        data = data.float() if data.is_floating_point() else data
    elif hasattr(data, "convert") and data.mode[:1] not in "IF":  # a PIL image; I and F exceed 8 bits
        data = data.convert("RGB")
    try:
        array = np.asarray(data)
    except (ValueError, TypeError, RuntimeError):  # ragged
        return None
    return array if array.dtype.kind in "biuf" else None


def _channels_last(frame: np.ndarray) -> np.ndarray | None:
    if frame.ndim == 2:
        return frame[..., None]
    if frame.ndim != 3:
        return None
    if frame.shape[2] in (1, 3, 4):
        return frame
    return np.moveaxis(frame, 0, 2) if frame.shape[0] in (1, 3, 4) else None


def _described(value: Any) -> str:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is not None and dtype is not None:
        return f"{type(value).__name__} of shape {tuple(shape)} and dtype {dtype}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return "None" if value is None else f"a {type(value).__name__}"
