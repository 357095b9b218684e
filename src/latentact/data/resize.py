"""The one way in which pictures change size, for training data and for what an environment shows."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import UInt8
from torch.nn.functional import interpolate


def resize(frames: UInt8[np.ndarray, "n h w c"], resolution: int) -> UInt8[np.ndarray, "n h2 w2 c"]:
    """Return frames at `resolution` x `resolution`, bilinear and antialiased; 0: as they are."""
    if resolution == 0 or frames.shape[1:3] == (resolution, resolution):
        return frames
    planes = torch.from_numpy(np.require(frames, requirements=("C", "W"))).permute(0, 3, 1, 2)
    small = interpolate(planes, size=(resolution, resolution), mode="bilinear", antialias=True)
    return np.ascontiguousarray(small.permute(0, 2, 3, 1).numpy())
