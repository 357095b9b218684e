"""IMPALA convolutional network (arXiv 1802.01561), with the module names that LAPO's checkpoints use."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class _ImpalaResidual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(F.relu_(self.conv0(F.relu(x)))).add_(x)


class _Stage(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.res_block0 = _ImpalaResidual(out_channels)
        self.res_block1 = _ImpalaResidual(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.res_block1(self.res_block0(F.max_pool2d(self.conv(x), 3, stride=2, padding=1)))


class Impala(nn.Module):
    """Encode an image: stages that halve the resolution (rounding up), a linear layer and a ReLU.

    Args:
        in_channels: channels of the input.
        size: height and width of the input in pixels.
        channels: output channels of the stages.
        features: length of the feature vector.
    """

    def __init__(self, in_channels: int, size: int, channels: tuple[int, ...], features: int = 256) -> None:
        super().__init__()
        widths = (in_channels, *channels)
        self.conv_stack = nn.Sequential(*(_Stage(i, o) for i, o in zip(widths, channels, strict=False)))
        for _ in channels:
            size = (size + 1) // 2
        self.fc = nn.Linear(channels[-1] * size * size, features)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b f"]:
        """Return non-negative features; works in channels_last, which is faster on every device."""
        x = x.contiguous(memory_format=torch.channels_last)
        return F.relu_(self.fc(F.relu(self.conv_stack(x).flatten(1))))
