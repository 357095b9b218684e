"""Decoded frames and images as upright 8-bit RGB: the one place that decides color, depth and orientation.

Video follows FFmpeg's command line: the matrix and range that the stream names (BT.601 where it names none,
whatever its size), bicubic chroma, alpha dropped, and the display matrix applied, mirroring included. Images
in tables follow LeRobot, which shows them as Pillow decodes them, turned by their EXIF orientation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from av import VideoFrame
from av.sidedata.sidedata import Type
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from jaxtyping import UInt8
from PIL import Image, ImageOps

from latentact.data.format import Unreadable

_BT601, _BT709 = 5, 1
_BT601_NAMES = (5, 6)  # 625 and 525 lines
_BICUBIC = int(Interpolation.BICUBIC)
_MATRICES = (1, 4, 5, 6, 7, 9, 10)  # AVColorSpace values that swscale has coefficients for
_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")


class Converter:
    """Converts the frames of one video stream to RGB; keeps swscale's context between frames."""

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()
        self._kind: tuple[int, ...] | None = None
        self._colors: dict[str, int] = {}
        self._matrix = (1, 0, 0, 1)

    def __call__(self, frame: VideoFrame) -> UInt8[np.ndarray, "h w 3"]:
        """Return a decoded frame as upright RGB, values 0..255.

        Raises:
            Unreadable: its display matrix is no multiple of a quarter turn.
        """
        kind = (frame.width, frame.height, frame.colorspace, frame.color_range)
        if kind != self._kind:
            self._kind, self._matrix = kind, display_matrix(frame)
            self._colors = _colors(frame)
        rgb = self._reformatter.reformat(frame, format="rgb24", interpolation=_BICUBIC, **self._colors)
        return _upright(rgb.to_ndarray(), self._matrix)


def _colors(frame: VideoFrame) -> dict[str, int]:
    """Return the matrix and range of a frame as PyAV's arguments; none where swscale assumes them anyway."""
    matrix = int(frame.colorspace) if frame.colorspace in _MATRICES else _BT601
    assumed = frame.format.name.startswith(("yuvj", "gray", "ya"))  # full range
    full = frame.color_range == ColorRange.JPEG if frame.color_range else assumed
    if frame.format.is_rgb or (matrix in _BT601_NAMES and full == assumed):
        return {}
    return {
        "src_colorspace": matrix,
        # RGB has no matrix: PyAV applies that of the source only where the two differ.
        "dst_colorspace": _BT601 if matrix == _BT709 else _BT709,
        "src_color_range": ColorRange.JPEG if full else ColorRange.MPEG,
        "dst_color_range": ColorRange.JPEG,
    }


def display_matrix(frame: VideoFrame) -> tuple[int, int, int, int]:
    """Return the signs (a, b, c, d) of a frame's display matrix; (1, 0, 0, 1): it is shown as it is stored.

    Raises:
        Unreadable: it is no multiple of a quarter turn.
    """
    attached: Any = frame.side_data
    side_data = attached.get(Type.DISPLAYMATRIX)
    if side_data is None:
        return 1, 0, 0, 1
    entries = np.frombuffer(bytes(side_data), np.int32)[[0, 1, 3, 4]].astype(np.int64)
    small = np.abs(entries).max() / 100
    signs = np.where(np.abs(entries) <= small, 0, np.sign(entries))
    a, b, c, d = (int(sign) for sign in signs)
    if not (a and d and not b and not c) and not (b and c and not a and not d):
        raise Unreadable(
            f"its display matrix {entries.tolist()} is no multiple of a quarter turn; encode it again"
        )
    return a, b, c, d


def _upright(pixels: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    a, b, c, d = matrix
    if (a, b, c, d) == (1, 0, 0, 1):
        return pixels
    if b:  # x and y change places
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return np.ascontiguousarray(pixels[:: d or 1, :: a or 1])


def image_rgb(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    """Return an image as upright RGB, values 0..255; alpha is dropped, gray repeated, palettes looked up.

    Raises:
        Unreadable: it has more than 8 bits per value, as depth and infrared images have.
    """
    if image.mode not in _EIGHT_BITS:
        raise Unreadable(
            f"its images must have 8 bits per value, got mode {image.mode}, which depth and infrared cameras "
            f"write; convert them to 8 bits, or name another camera"
        )
    return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
