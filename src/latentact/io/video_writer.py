"""Write frames as H.264 video."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

SMALLEST_VIDEO = 224
"""Height and width in pixels below which frames are enlarged for viewing."""


def write_video(path: Path, frames: UInt8[np.ndarray, "t h w 3"], fps: int | float) -> None:
    """Write an H.264 mp4 that browsers play, atomically.

    Frames smaller than `SMALLEST_VIDEO` are enlarged by an integer factor; an odd last row or column is
    cropped.

    Args:
        path: mp4 file.
        frames: RGB, 0..255.
        fps: frames per second.
    """
    import av

    factor = max(1, -(-SMALLEST_VIDEO // max(frames.shape[1:3])))
    draft = path.with_name(path.name + ".tmp")
    with av.open(str(draft), "w", format="mp4", options={"movflags": "faststart"}) as container:
        rate = Fraction(fps).limit_denominator(1000)
        stream: Any = container.add_stream("libx264", rate, options={"crf": "18"})
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            large = frame.repeat(factor, axis=0).repeat(factor, axis=1)
            large = np.ascontiguousarray(large[: large.shape[0] // 2 * 2, : large.shape[1] // 2 * 2])
            stream.height, stream.width = large.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(large, format="rgb24")))
        container.mux(stream.encode())
    draft.replace(path)
