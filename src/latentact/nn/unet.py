"""U-Net from frames and one latent vector to the next frame: LAPO's world model (arXiv 2312.10812).

Module names are those of LAPO's checkpoints. Same results at less cost: the published code repeats the latent
over all pixels before the first convolution; here its part of that convolution is computed once per border
case (inside, edges, corners). Convolutions without overlapping windows run as matrix products.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class _UnetResidual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.res_block = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels // 2, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels // 2, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.res_block(x)


class _Down(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(out_channels)
        self.res = _UnetResidual(out_channels)

    def forward(self, x: Tensor, latent: Tensor | None = None) -> Tensor:
        x = self.conv(x) if latent is None else _conv_with_constant(self.conv, x, latent)
        return F.relu_(F.max_pool2d(self.res(self.norm(x)), 2, 2))


class _Up(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, factor: int = 2) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(in_channels, out_channels, factor, factor)
        self.norm = nn.BatchNorm2d(out_channels)
        self.res = _UnetResidual(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.res(self.norm(_upsampled(self.conv, x))))


def _conv_with_constant(conv: nn.Conv2d, x: Tensor, latent: Tensor) -> Tensor:
    """Return ``conv(cat([x, latent repeated over all pixels]))`` of a 3x3 convolution, zero padding 1."""
    pixels, constant = conv.weight.split([x.shape[1], latent.shape[1]], dim=1)
    taps = torch.einsum("bi,oiyx->boyx", latent.to(constant.dtype), constant)
    # Row 0 misses the taps above it, the last row those below; the same for columns.
    inside = taps.new_tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    cases = inside @ taps @ inside.T
    height, width = x.shape[-2:]
    first, middle, last = cases.split(1, dim=2)
    cases = torch.cat([first, middle.expand(-1, -1, height - 2, -1), last], dim=2)
    first, middle, last = cases.split(1, dim=3)
    y = F.conv2d(x, pixels, conv.bias, padding=1)
    full = torch.cat([first, middle.expand(-1, -1, -1, width - 2), last], dim=3)
    return y + full.to(y.dtype)


def _upsampled(conv: nn.ConvTranspose2d, x: Tensor) -> Tensor:
    """Return ``conv(x)`` of a transposed convolution whose stride is its kernel's size."""
    (b, _, h, w), f, out = x.shape, conv.kernel_size[0], conv.out_channels
    weight = conv.weight.permute(2, 3, 1, 0).flatten(0, 2)
    assert conv.bias is not None
    blocks = F.linear(x.permute(0, 2, 3, 1), weight, conv.bias.repeat(f * f))
    rows = blocks.view(b, h, w, f, f, out).transpose(2, 3)
    return rows.reshape(b, h * f, w * f, out).permute(0, 3, 1, 2)


def _flattened(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Return ``conv(x)`` of a convolution whose kernel covers the whole image."""
    flat, weight = (t.permute(0, 2, 3, 1).flatten(1) for t in (x, conv.weight))
    return F.linear(flat, weight, conv.bias)[:, :, None, None]


class UNet(nn.Module):
    """Map frames and a latent vector to the next frame.

    Args:
        in_channels: channels of all input frames together.
        latent_dim: length of the latent vector.
        out_channels: channels of the predicted frame.
        base: channels of the highest-resolution level; deeper levels double it.
        size: height and width in pixels, a multiple of 32.
    """

    def __init__(
        self, in_channels: int, latent_dim: int, out_channels: int, base: int = 24, size: int = 64
    ) -> None:
        super().__init__()
        b = base
        down = (in_channels + latent_dim, b, 2 * b, 4 * b, 8 * b, 16 * b, 32 * b)
        self.down = nn.ModuleList([_Down(i, o) for i, o in pairwise(down[:-1])])
        self.down.append(nn.Conv2d(16 * b, 32 * b, size // 32))
        up = (32 * b, 16 * b, 8 * b, 4 * b, 2 * b, b, b)
        skips = (latent_dim, 16 * b, 8 * b, 4 * b, 2 * b, b)
        factors = (size // 32, 2, 2, 2, 2, 2)
        self.up = nn.ModuleList(
            [_Up(i + s, o, f) for i, s, o, f in zip(up[:-1], skips, up[1:], factors, strict=True)]
        )
        self.final_conv = nn.Sequential(
            nn.Conv2d(b + in_channels, b, 3, padding=1),
            _UnetResidual(b),
            nn.ReLU(),
            nn.Conv2d(b, out_channels, 1),
        )

    def forward(
        self, frames: Float[Tensor, "b i h w"], latent: Float[Tensor, "b d"]
    ) -> Float[Tensor, "b o h w"]:
        """Return the next frame in -0.5..0.5; `frames` are in the same range, latest last."""
        x = self.down[0](frames, latent)
        skips = [x]
        *levels, bottom = self.down[1:]
        for layer in levels:
            x = layer(x)
            skips.append(x)
        assert isinstance(bottom, nn.Conv2d)
        x = _flattened(bottom, x)
        skips.append(latent[:, :, None, None].to(x.dtype))
        for layer, skip in zip(self.up, reversed(skips), strict=True):
            x = layer(torch.cat([x, skip], dim=1))
        return torch.tanh(self.final_conv(torch.cat([x, frames.to(x.dtype)], dim=1))) / 2
