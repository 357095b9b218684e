"""Resize frames: the same code for training data, environments and published models."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch.nn.functional import interpolate


def resize(
    frames: UInt8[np.ndarray, "n h w c"], resolution: int, kernel: str = "uint8"
) -> UInt8[np.ndarray, "n h2 w2 c"]:
    """Resize frames to `resolution` x `resolution`, bilinear and antialiased; 0 returns them unchanged.

    Args:
        frames: 0..255.
        resolution: pixels.
        kernel: one of `latentact.types.KERNELS`.
    """
    if resolution == 0 or frames.shape[1:3] == (resolution, resolution):
        return frames
    size = (resolution, resolution)
    if kernel == "pillow":
        arrays = (
            frames[..., 0] if frames.shape[3] == 1 else frames
        )  # Pillow's gray images have no channel axis
        images = (Image.fromarray(array).resize(size, Image.Resampling.BILINEAR) for array in arrays)
        return np.stack([np.asarray(image) for image in images]).reshape(len(frames), *size, -1)
    planes = torch.from_numpy(np.require(frames, requirements=("C", "W"))).permute(0, 3, 1, 2)
    if kernel == "float":
        small = interpolate(planes.float(), size, mode="bilinear", antialias=True).round_().byte()
    else:
        small = interpolate(planes, size, mode="bilinear", antialias=True)
    return np.ascontiguousarray(small.permute(0, 2, 3, 1).numpy())
