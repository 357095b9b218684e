"""How pictures change size: training data, what an environment shows, what a published model is given."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch.nn.functional import interpolate


def resize(
    frames: UInt8[np.ndarray, "n h w c"], resolution: int, kernel: str = "uint8"
) -> UInt8[np.ndarray, "n h2 w2 c"]:
    """Return frames at `resolution` x `resolution`, bilinear and antialiased; 0: as they are.

    `kernel` is one of `latentact.types.KERNELS`.
    """
    if resolution == 0 or frames.shape[1:3] == (resolution, resolution):
        return frames
    size = (resolution, resolution)
    if kernel == "pillow":
        flat = frames[..., 0] if frames.shape[3] == 1 else frames  # Pillow's gray pictures have no channels
        pictures = (Image.fromarray(each).resize(size, Image.Resampling.BILINEAR) for each in flat)
        return np.stack([np.asarray(each) for each in pictures]).reshape(len(frames), *size, -1)
    planes = torch.from_numpy(np.require(frames, requirements=("C", "W"))).permute(0, 3, 1, 2)
    if kernel == "float":
        small = interpolate(planes.float(), size, mode="bilinear", antialias=True).round_().byte()
    else:
        small = interpolate(planes, size, mode="bilinear", antialias=True)
    return np.ascontiguousarray(small.permute(0, 2, 3, 1).numpy())
