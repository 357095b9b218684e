"""Convolutional networks with a patch stem: cheap versions of IMPALA and the U-Net.

A patch stem (stride = patch size, pixel shuffle on the way out) keeps all computation at low resolution,
where a training step costs a fraction of that of the published full-resolution networks.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class Residual(nn.Module):
    """Pre-activation residual block of two 3x3 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` plus the residual, same shape."""
        return x + self.conv1(F.relu(self.conv0(F.relu(x))))


class PatchEncoder(nn.Module):
    """Encode an image: the first level embeds patches, later levels may halve the resolution.

    Args:
        in_channels: channels of the input.
        size: height and width in pixels; incomplete patches are padded with zeros.
        patch: side of a patch in pixels.
        channels: channels of the levels; two residual blocks each.
        features: length of the feature vector.
        halve: whether levels after the first halve the resolution.
    """

    def __init__(
        self,
        in_channels: int,
        size: int,
        patch: int,
        channels: tuple[int, ...],
        features: int = 256,
        halve: bool = True,
    ) -> None:
        super().__init__()
        _require_sizes(patch, channels)
        grain = patch * 2 ** (len(channels) - 1 if halve else 0)
        if patch > size or grain > 4 * size:
            raise ValueError(
                f"patches of {patch} pixels on {len(channels)} levels must fit frames of {size} pixels"
            )
        self.pad = -size % grain
        size += self.pad
        layers: list[nn.Module] = []
        width, stride = in_channels, patch
        for channel in channels:
            layers += [nn.Conv2d(width, channel, stride, stride), Residual(channel), Residual(channel)]
            width, size = channel, size // stride
            stride = 2 if halve else 1
        self.convs = nn.Sequential(*layers)
        self.fc = nn.Linear(width * size * size, features)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b f"]:
        """Return non-negative features."""
        x = F.pad(x, (0, self.pad, 0, self.pad)) if self.pad else x
        return F.relu(self.fc(F.relu(self.convs(x)).flatten(1)))


class PatchUNet(nn.Module):
    """Map frames and a latent vector to the change of the current frame; every block receives the latent.

    Args:
        in_channels: channels of all input frames together, the current frame last.
        latent_dim: length of the latent vector.
        out_channels: channels of a frame.
        patch: side of a patch in pixels.
        channels: channels of the levels; the first is at patch resolution, each further one halves it.
    """

    def __init__(
        self, in_channels: int, latent_dim: int, out_channels: int, patch: int, channels: tuple[int, ...]
    ) -> None:
        super().__init__()
        _require_sizes(patch, channels)
        first = channels[0]
        self.patch = patch
        self.stem = nn.Conv2d(in_channels, first, patch, patch)
        self.down = nn.ModuleList(nn.Conv2d(i, o, 2, 2) for i, o in pairwise(channels))
        self.enter = nn.ModuleList(nn.Linear(latent_dim, c) for c in channels)
        self.blocks = nn.ModuleList(nn.ModuleList([Residual(c), Residual(c)]) for c in channels)
        self.up = nn.ModuleList(nn.Conv2d(o, 4 * i, 1) for i, o in pairwise(channels))
        self.merge = nn.ModuleList(nn.Conv2d(2 * c, c, 3, padding=1) for c in channels[:-1])
        self.leave = nn.ModuleList(nn.Linear(latent_dim, c) for c in channels)
        self.out_blocks = nn.ModuleList(nn.ModuleList([Residual(c), Residual(c)]) for c in channels)
        self.head = nn.Conv2d(first, out_channels * patch * patch, 1)
        with torch.no_grad():  # start near "nothing changes"
            self.head.weight.mul_(0.1)

    def forward(
        self, frames: Float[Tensor, "b i h w"], latent: Float[Tensor, "b d"]
    ) -> Float[Tensor, "b o h w"]:
        """Return the predicted change of the current frame."""
        x, skips = self.stem(frames), []
        for level, parts in enumerate(self.blocks):
            if level:
                x = self.down[level - 1](F.relu(x))
            x = _shifted(x, parts, self.enter[level](latent))
            skips.append(x)
        for level in reversed(range(len(self.blocks))):
            if level < len(self.up):
                x = F.pixel_shuffle(self.up[level](F.relu(x)), 2)
                x = self.merge[level](torch.cat([F.relu(x), skips[level]], dim=1))
            x = _shifted(x, self.out_blocks[level], self.leave[level](latent))
        return F.pixel_shuffle(self.head(F.relu(x)), self.patch)


def _shifted(x: Tensor, blocks: nn.Module, bias: Tensor) -> Tensor:
    """Apply blocks, each to its input plus the bias of the channels."""
    for block in blocks:  # type: ignore[attr-defined]
        x = block(x + bias[:, :, None, None])
    return x


def _require_sizes(patch: int, channels: tuple[int, ...]) -> None:
    if not 1 <= len(channels) <= 12:
        raise ValueError(f"channels must have 1 to 12 levels, got {len(channels)}")
    if patch < 1:
        raise ValueError(f"patch must be at least 1 pixel, got {patch}")
