"""Networks for grids of integer features, such as XLand-MiniGrid's 5x5x2 (tile and color per cell)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from latentact.nn.patch import Residual


class GridEmbedding(nn.Module):
    """Embed integer cells: one table per feature, with stacked outputs.

    Args:
        features: integers per cell.
        values: number of values per integer.
        dim: channels per feature.
    """

    def __init__(self, features: int, values: int, dim: int) -> None:
        super().__init__()
        self.values = values
        self.tables = nn.ModuleList(nn.Embedding(values, dim) for _ in range(features))

    def forward(self, cells: UInt8[Tensor, "b i h w"]) -> Float[Tensor, "b o h w"]:
        """Return channels; `cells` holds one or more frames, features innermost, values below `values`."""
        parts = [self.tables[i % len(self.tables)](cell) for i, cell in enumerate(cells.long().unbind(1))]
        return rearrange(torch.stack(parts, 1), "b i h w d -> b (i d) h w")


class GridEncoder(nn.Module):
    """Encode frames of integer cells as a feature vector.

    Args:
        frames: number of stacked frames.
        features: integers per cell.
        size: height and width in cells.
        values: number of values per integer.
        channels: hidden channels.
        out_features: length of the feature vector.
    """

    def __init__(
        self, frames: int, features: int, size: int, values: int, channels: int, out_features: int = 256
    ) -> None:
        super().__init__()
        self.embed = GridEmbedding(features, values, 16)
        self.convs = nn.Sequential(
            nn.Conv2d(frames * features * 16, channels, 3, padding=1), Residual(channels), Residual(channels)
        )
        self.fc = nn.Linear(channels * size * size, out_features)

    def forward(self, cells: UInt8[Tensor, "b i h w"]) -> Float[Tensor, "b f"]:
        """Return non-negative features."""
        return F.relu(self.fc(F.relu(self.convs(self.embed(cells))).flatten(1)))


class GridDecoder(nn.Module):
    """Map frames of integer cells and a latent vector to logits of the cell values of the next frame.

    Args:
        frames: number of stacked frames.
        features: integers per cell.
        values: number of values per integer.
        latent_dim: length of the latent vector.
        channels: hidden channels.
    """

    def __init__(self, frames: int, features: int, values: int, latent_dim: int, channels: int) -> None:
        super().__init__()
        self.features = features
        self.embed = GridEmbedding(features, values, 16)
        self.stem = nn.Conv2d(frames * features * 16, channels, 3, padding=1)
        self.enter = nn.Linear(latent_dim, channels)
        self.blocks = nn.ModuleList(Residual(channels) for _ in range(4))
        self.head = nn.Conv2d(channels, features * values, 1)

    def forward(
        self, cells: UInt8[Tensor, "b i h w"], latent: Float[Tensor, "b d"]
    ) -> Float[Tensor, "b v c h w"]:
        """Return logits over values."""
        x, bias = self.stem(self.embed(cells)), self.enter(latent)[:, :, None, None]
        for block in self.blocks:
            x = block(x + bias)
        return rearrange(self.head(F.relu(x)), "b (c v) h w -> b v c h w", c=self.features)


class CellEncoder(nn.Module):
    """Map frames of integer cells to a feature vector at low cost: embeddings and two layers.

    Args:
        frames: number of stacked frames.
        features: integers per cell.
        size: height and width in cells.
        values: number of values of an integer.
    """

    def __init__(self, frames: int, features: int, size: int, values: int) -> None:
        super().__init__()
        self.embed = GridEmbedding(features, values, 8)
        self.net = nn.Sequential(
            nn.Linear(frames * features * 8 * size * size, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()
        )

    def forward(self, cells: UInt8[Tensor, "b i h w"]) -> Float[Tensor, "b 256"]:
        """Return non-negative features."""
        return self.net(self.embed(cells).flatten(1))


class CellMixer(nn.Module):
    """Map frames of integer cells and a latent vector to logits of the cell values of the next frame.

    The latent vector selects the cells of the last frames from which each cell of the next frame is copied,
    since turning and walking move all cells together, and adds new content.

    Args:
        frames: number of stacked frames.
        features: integers per cell.
        size: height and width in cells.
        values: number of values of an integer.
        latent_dim: length of the latent vector.
    """

    def __init__(self, frames: int, features: int, size: int, values: int, latent_dim: int) -> None:
        super().__init__()
        self.frames, self.features, self.size = frames, features, size
        self.embed = GridEmbedding(features, values, 16)
        self.source = nn.Linear(latent_dim, size**4 * frames)
        self.new = nn.Linear(latent_dim, size**2 * features * 16)
        self.head = nn.Sequential(nn.Linear(features * 16, 64), nn.ReLU(), nn.Linear(64, features * values))

    def forward(
        self, cells: UInt8[Tensor, "b i h w"], latent: Float[Tensor, "b d"]
    ) -> Float[Tensor, "b v c h w"]:
        """Return logits over values."""
        old = rearrange(self.embed(cells), "b (t d) h w -> b (t h w) d", t=self.frames)
        source = rearrange(self.source(latent), "b (n m) -> b n m", n=self.size**2).softmax(2)
        new = rearrange(self.new(latent), "b (n d) -> b n d", n=self.size**2)
        scores = self.head(source @ old + new)
        return rearrange(scores, "b (h w) (c v) -> b v c h w", h=self.size, c=self.features)
