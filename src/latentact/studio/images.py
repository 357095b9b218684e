"""Frames as data that a page embeds."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from latentact.reporting.html import text

SHOWN = 128
"""Largest height and width of a frame on a sheet."""
LARGE = 1_000_000
"""Bytes above which a sheet is compressed with loss."""


def sheet(frames: UInt8[np.ndarray, "t h w 3"]) -> dict[str, Any]:
    """Return all frames as one image, row by row: its data URI, columns, and number and size of frames."""
    shrink = math.ceil(max(frames.shape[1:3]) / SHOWN)
    frames = frames[:, ::shrink, ::shrink]
    count, height, width = frames.shape[:3]
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    padded = np.zeros((rows * columns, height, width, 3), np.uint8)
    padded[:count] = frames
    whole = padded.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, -1, 3)
    return {"uri": uri(whole), "columns": columns, "n": count, "w": width, "h": height}


def uri(pixels: UInt8[np.ndarray, "h w 3"]) -> str:
    """Return an image as a data URI: without loss, unless it is large."""
    image, file = Image.fromarray(pixels), io.BytesIO()
    image.save(file, "webp", lossless=True, quality=40, method=2)
    if file.tell() > LARGE:
        file = io.BytesIO()
        image.save(file, "webp", quality=88, method=2)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def image(pixels: UInt8[np.ndarray, "h w 3"], alt: str) -> str:
    """Return an HTML image."""
    return f'<img src="{uri(pixels)}" alt="{text(alt)}">'


def pairs(now: UInt8[np.ndarray, "n h w 3"], after: UInt8[np.ndarray, "n h w 3"]) -> str:
    """Return pairs of frames, before and after, in a row."""
    cells = (
        f'<span class="st-pair">{image(a, "now")}{image(b, "next")}</span>'
        for a, b in zip(now, after, strict=True)
    )
    return f'<div class="st-strip">{"".join(cells)}</div>'


def shaded(
    pixels: UInt8[np.ndarray, "h w 3"], response: Float[np.ndarray, "c c"], size: int = 224
) -> UInt8[np.ndarray, "size size 3"]:
    """Return a frame with cells tinted by their response (0..1)."""
    large = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST), np.float32)
    cells = Image.fromarray((255 * response).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    part = 0.75 * np.asarray(cells, np.float32)[..., None] / 255
    return (large * (1 - part) + np.array([255, 120, 20]) * part).round().astype(np.uint8)
