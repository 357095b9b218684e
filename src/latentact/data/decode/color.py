"""Convert decoded frames and images to upright 8-bit RGB; the only code for color, depth and orientation.

Video frames equal those of the FFmpeg command line: color matrix and range of the stream (BT.601 if
unspecified, at any size), bicubic chroma, no alpha, and the display matrix applied, including mirroring.
Images in tables equal those of LeRobot: decoded by Pillow, with the EXIF orientation applied. 16-bit gray is
reduced to 8 bits, as in a video.
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
_MATRICES = (1, 4, 5, 6, 7, 9, 10)  # AVColorSpace values for which swscale has coefficients
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
"""Pillow's modes of 16-bit gray."""
_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")


class Converter:
    """Convert the frames of one video stream to RGB; reuses the swscale context between frames."""

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()
        self._kind: tuple[int, ...] | None = None
        self._colors: dict[str, int] = {}
        self._matrix = (1, 0, 0, 1)

    def __call__(self, frame: VideoFrame) -> UInt8[np.ndarray, "h w 3"]:
        """Return a decoded frame as upright RGB, 0..255.

        Raises:
            Unreadable: the display matrix is not a multiple of 90 degrees.
        """
        kind = (frame.width, frame.height, frame.colorspace, frame.color_range)
        if kind != self._kind:
            self._kind, self._matrix = kind, display_matrix(frame)
            self._colors = _colors(frame)
        rgb = self._reformatter.reformat(frame, format="rgb24", interpolation=_BICUBIC, **self._colors)
        return _upright(rgb.to_ndarray(), self._matrix)


def _colors(frame: VideoFrame) -> dict[str, int]:
    """Return color matrix and range as arguments of PyAV; empty if they are the defaults of swscale."""
    matrix = int(frame.colorspace) if frame.colorspace in _MATRICES else _BT601
    full_by_default = frame.format.name.startswith(("yuvj", "gray", "ya"))
    full = frame.color_range == ColorRange.JPEG if frame.color_range else full_by_default
    if frame.format.is_rgb or (matrix in _BT601_NAMES and full == full_by_default):
        return {}
    return {
        "src_colorspace": matrix,
        # RGB has no matrix; PyAV applies the source matrix only if the two differ.
        "dst_colorspace": _BT601 if matrix == _BT709 else _BT709,
        "src_color_range": ColorRange.JPEG if full else ColorRange.MPEG,
        "dst_color_range": ColorRange.JPEG,
    }


def display_matrix(frame: VideoFrame) -> tuple[int, int, int, int]:
    """Return the signs (a, b, c, d) of a frame's display matrix; (1, 0, 0, 1) is the identity.

    A matrix with a column of zeros, which has no angle, is ignored, as FFmpeg does.

    Raises:
        Unreadable: the display matrix is not a multiple of 90 degrees.
    """
    attached: Any = frame.side_data
    side_data = attached.get(Type.DISPLAYMATRIX)
    if side_data is None:
        return 1, 0, 0, 1
    entries = np.frombuffer(bytes(side_data), np.int32)[[0, 1, 3, 4]].astype(np.int64)
    if not (entries[[0, 2]].any() and entries[[1, 3]].any()):
        return 1, 0, 0, 1
    small = np.abs(entries).max() / 100
    signs = np.where(np.abs(entries) <= small, 0, np.sign(entries))
    a, b, c, d = (int(sign) for sign in signs)
    if not (a and d and not b and not c) and not (b and c and not a and not d):
        raise Unreadable(
            f"its display matrix must be a multiple of 90 degrees, got {entries.tolist()}; encode it again"
        )
    return a, b, c, d


def _upright(pixels: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Apply a display matrix."""
    a, b, c, d = matrix
    if (a, b, c, d) == (1, 0, 0, 1):
        return pixels
    if b:  # swaps x and y
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return np.ascontiguousarray(pixels[:: d or 1, :: a or 1])


def image_rgb(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    """Return an image as upright RGB, 0..255; drops alpha, repeats gray, applies palettes.

    Of 16-bit gray, such as depth in millimeters, the upper 8 bits are kept, as in a gray16 video.

    Raises:
        Unreadable: the image has 32-bit values, whose range the file does not give.
    """
    if image.mode in SIXTEEN_BITS:
        gray = np.asarray(ImageOps.exif_transpose(image)).astype("<u2")
        return Converter()(VideoFrame.from_ndarray(gray, format="gray16le"))
    if image.mode not in _EIGHT_BITS:
        raise Unreadable(
            f"its images must have 8 or 16 bits per channel, got mode {image.mode} of 32 bits; convert them, "
            f"or choose another camera"
        )
    return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
