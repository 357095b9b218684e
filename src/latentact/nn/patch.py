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

_LAYERS = 3
"""Layers of a level: a convolution and two residual blocks."""
_NO_MASS = 1e-3
"""Added to the total weight of a keypoint, which is at the center without activations."""


class Residual(nn.Module):
    """Pre-activation residual block of two 3x3 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` plus the residual, same shape."""
        return x + self.conv1(F.relu(self.conv0(F.relu(x))))


class PreciseLinear(nn.Linear):
    """Linear layer that has full precision under autocast too."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the outputs, fp32."""
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float())


class Keypoints(nn.Module):
    """Positions of learned parts of an image: the centers of mass of feature maps.

    As the spatial softmax of Levine et al. (2016, arXiv 1504.00702), but with squared activations as weights:
    pixels at the edge of an object count the more, the more of them it covers, so that its center is found to
    a fraction of a pixel.

    Args:
        in_channels: channels of the input.
        count: number of keypoints.
    """

    def __init__(self, in_channels: int, count: int) -> None:
        super().__init__()
        self.maps = nn.Conv2d(in_channels, count, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b f"]:
        """Return x and y of all keypoints in -1..1, then the strongest activation of their maps, fp32."""
        maps = F.relu(self.maps(x))
        with torch.autocast(x.device.type, enabled=False):
            maps = maps.float()
            weights = maps.square()
            weights = weights / (weights.sum((2, 3), keepdim=True) + _NO_MASS)
            across, down = (torch.linspace(-1, 1, n, device=x.device) for n in (x.shape[3], x.shape[2]))
            positions = [(weights.sum(2) * across).sum(2), (weights.sum(3) * down).sum(2)]
            return torch.cat([*positions, maps.amax((2, 3))], dim=1)


class PatchEncoder(nn.Module):
    """Encode an image: the first level embeds patches, later levels may halve the resolution.

    Args:
        in_channels: channels of the input.
        size: height and width in pixels; incomplete patches are padded with zeros.
        patch: side of a patch in pixels.
        channels: channels of the levels; two residual blocks each.
        features: number of non-negative features.
        halve: whether levels after the first halve the resolution.
        keypoints: number of keypoints of the first level, appended to the features in full precision.
    """

    def __init__(
        self,
        in_channels: int,
        size: int,
        patch: int,
        channels: tuple[int, ...],
        features: int = 256,
        halve: bool = True,
        keypoints: int = 0,
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
        self.keypoints = Keypoints(channels[0], keypoints) if keypoints else None
        self.fc = nn.Linear(width * size * size, features)
        self.out_features = features + 3 * keypoints

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b f"]:
        """Return features and keypoints."""
        x = F.pad(x, (0, self.pad, 0, self.pad)) if self.pad else x
        if self.keypoints is None:
            return F.relu(self.fc(F.relu(self.convs(x)).flatten(1)))
        first = self.convs[:_LAYERS](x)
        features = F.relu(self.fc(F.relu(self.convs[_LAYERS:](first)).flatten(1)))
        return torch.cat([features.float(), self.keypoints(F.relu(first))], dim=1)


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
