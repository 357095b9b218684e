"""Network of LAPA's latent action quantization (LAQ, arXiv 2410.11758): C-ViViT on a pair of frames.

A spatial transformer attends within each frame, a temporal one across the two tokens of each position, and a
small CNN reduces each frame's tokens to a few cells; the latent action is the second frame's minus the
first's. The decoder is a spatial transformer over the first frame's patches that attends to the latent
action.

Module names are those of LAPA's checkpoints (but `dsconv.weight` loses its dimension of size 1). Some
behavior of the published code is kept only with `compat`: keys and values of self-attention come from
unnormalized tokens; the positional convolution of the temporal transformer mixes positions and times, and
that of the spatial transformer leaks the first frame into the second; the decoder's codes are mixed with each
other; and pixels are normalized within their patch, which removes its brightness.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from einops.layers.torch import Rearrange
from jaxtyping import Float
from torch import Tensor, nn

_HALVE = (3, 2, 1)
CELLS = {
    1: (_HALVE, (4, 1, 0)),
    2: (_HALVE, ((3, 4), 1, 0)),
    4: (_HALVE, (3, 1, 0)),
    16: (_HALVE, _HALVE),
    64: (_HALVE,),
    256: (_HALVE,),
}
"""Number of cells -> published convolutions (kernel, stride, padding) that reduce a frame's tokens to it."""


def reduction(grid: int, cells: int) -> tuple | None:
    """Return the convolutions that reduce grid x grid tokens to this many cells; None if that is impossible.

    They are the published ones, preceded by convolutions that halve a larger grid.
    """
    for halvings in range(8):
        layers = (_HALVE,) * halvings + CELLS[cells]
        sides = [grid, grid]
        for kernel, stride, padding in layers:
            across = kernel if isinstance(kernel, tuple) else (kernel, kernel)
            sides = [max(0, (s + 2 * padding - k) // stride + 1) for s, k in zip(sides, across, strict=True)]
        if sides[0] * sides[1] == cells:
            return layers
    return None


class Norm(nn.Module):
    """Layer normalization with a gain; the offset is a constant zero."""

    beta: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        self.register_buffer("beta", torch.zeros(dim))

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Return normalized tokens."""
        return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta)


class PositionBias(nn.Module):
    """Attention bias from the offset between two positions of the grid (arXiv 2111.09883).

    Computed once per distinct offset, of which there are far fewer than pairs of positions.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        first = nn.Sequential(nn.Linear(2, dim), nn.LeakyReLU(0.1))
        second = nn.Sequential(nn.Linear(dim, dim), nn.LeakyReLU(0.1))
        self.net = nn.Sequential(first, second, nn.Linear(dim, heads))

    def forward(self, h: int, w: int) -> Float[Tensor, "heads n n"]:
        """Return the bias of a grid of h x w positions."""
        device = next(self.parameters()).device
        dy, dx = (torch.arange(1 - size, size, device=device) for size in (h, w))
        offset = torch.stack(torch.meshgrid(dy, dx, indexing="ij"), -1).flatten(0, 1).float()
        bias = self.net(offset.sign() * (offset.abs() + 1).log())
        y, x = (part.flatten() for part in torch.meshgrid(dy[h - 1 :], dx[w - 1 :], indexing="ij"))
        row = (y[:, None] - y + h - 1) * (2 * w - 1) + x[:, None] - x + w - 1
        return rearrange(bias[row], "i j heads -> heads i j")


class PositionalConv(nn.Module):
    """Depthwise 3x3x3 convolution over time and space, causal in time; weight [d, t, h, w].

    Each slice of the weight in time is applied as a 2-D convolution in the memory layout of the tokens, which
    is several times faster than a 3-D convolution.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        limit = 27**-0.5
        self.weight = nn.Parameter(torch.empty(dim, 3, 3, 3).uniform_(-limit, limit))
        self.bias = nn.Parameter(torch.empty(dim).uniform_(-limit, limit))

    def forward(self, x: Float[Tensor, "b t h w d"]) -> Float[Tensor, "b t h w d"]:
        """Return the update of the tokens."""
        b, t, *_, d = x.shape
        found = None
        for lag in range(min(t, 3)):
            y = rearrange(x[:, : t - lag], "b t h w d -> (b t) d h w")
            weight = self.weight[:, 2 - lag].unsqueeze(1)
            y = F.conv2d(y, weight, None if lag else self.bias, padding=1, groups=d)
            y = rearrange(y, "(b t) d h w -> b t h w d", b=b)
            found = y if found is None else torch.cat([found[:, :lag], found[:, lag:] + y], dim=1)
        assert found is not None
        return found


class CosineAttention(nn.Module):
    """Cosine attention; cross-attention also has `null` learned keys and values."""

    def __init__(self, dim: int, heads: int, head_dim: int, null: int, norm_keys: bool) -> None:
        super().__init__()
        self.heads, self.null, self.norm_keys = heads, null, norm_keys
        self.norm, self.context_norm = Norm(dim), Norm(dim)
        self.context_norm.requires_grad_(norm_keys)
        empty = torch.randn(heads, 2 * null, head_dim)
        if null:
            self.null_kv = nn.Parameter(empty)
        else:
            self.register_buffer("null_kv", empty)
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * head_dim, bias=False)
        self.q_scale, self.k_scale = (nn.Parameter(torch.ones(head_dim)) for _ in range(2))
        self.to_out = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(
        self,
        x: Float[Tensor, "n i d"],
        bias: Float[Tensor, "heads i j"] | None = None,
        context: Float[Tensor, "n j2 d"] | None = None,
    ) -> Float[Tensor, "n i d"]:
        """Return the update of the tokens."""
        source = x if context is None else context
        source = self.context_norm(source) if self.norm_keys else source
        split = "n i (heads c) -> n heads i c"
        q = rearrange(self.to_q(self.norm(x)), split, heads=self.heads)
        k, v = (rearrange(part, split, heads=self.heads) for part in self.to_kv(source).chunk(2, dim=-1))
        if self.null:
            null = self.null_kv.to(k.dtype).expand(len(k), -1, -1, -1)
            k, v = (torch.cat([null[:, :, i::2], part], dim=2) for i, part in enumerate((k, v)))
        q, k = F.normalize(q, dim=-1) * self.q_scale, F.normalize(k, dim=-1) * self.k_scale
        if bias is None and k.shape[2] == 2:  # two frames: a softmax of two is a sigmoid
            (k0, k1), (v0, v1) = k.split(1, dim=2), v.split(1, dim=2)
            share = torch.sigmoid(8.0 * (q * (k0 - k1)).sum(-1, keepdim=True)).to(v.dtype)
            out = v1 + share * (v0 - v1)
        else:
            mask = None if bias is None else bias.to(v.dtype)[None]
            out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask, scale=8.0)
        return self.to_out(rearrange(out, "n heads i c -> n i (heads c)"))


class Gate(nn.Module):
    """First half of the features times the GELU of the second."""

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d2"]:
        """Return half as many features."""
        value, gate = x.chunk(2, dim=-1)
        return F.gelu(gate) * value


class Transformer(nn.Module):
    """Layers of positional convolution, self-attention, cross-attention (decoder) and feed-forward.

    Args:
        dim: width of a token.
        depth: layers.
        heads: attention heads.
        head_dim: width of a head.
        axis: whether tokens attend within a frame or, per position, across frames.
        cross: whether it attends to a context.
        compat: whether to reproduce the deviations of the published code.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        head_dim: int,
        axis: Literal["space", "time"],
        cross: bool = False,
        compat: bool = False,
    ) -> None:
        super().__init__()
        self.axis, self.compat, inner = axis, compat, int(4 * (2 / 3) * dim)

        def layer() -> nn.ModuleList:
            feed = [nn.LayerNorm(dim), nn.Linear(dim, 2 * inner, bias=False), Gate(), nn.Identity()]
            return nn.ModuleList([
                PositionalConv(dim),
                CosineAttention(dim, heads, head_dim, null=0, norm_keys=not compat),
                CosineAttention(dim, heads, head_dim, null=2, norm_keys=True) if cross else nn.Identity(),
                nn.Sequential(*feed, nn.Linear(inner, dim, bias=False)),
            ])  # fmt: skip

        self.layers = nn.ModuleList(layer() for _ in range(depth))
        self.norm_out = Norm(dim)

    def forward(
        self,
        x: Float[Tensor, "b t h w d"],
        bias: Float[Tensor, "heads n n"] | None = None,
        context: Float[Tensor, "b m d"] | None = None,
    ) -> Float[Tensor, "b t h w d"]:
        """Return new tokens of every frame."""
        grid, t, h = x.shape, x.shape[1], x.shape[2]
        rows = "b t h w d -> (b t) (h w) d" if self.axis == "space" else "b t h w d -> (b h w) t d"
        back = "(b t) (h w) d -> b t h w d" if self.axis == "space" else "(b h w) t d -> b t h w d"
        sizes = {"t": t, "h": h} if self.axis == "space" else {"h": h, "w": grid[3]}
        x = rearrange(x, rows)
        for conv, attend, cross, feed in self.layers:  # type: ignore[misc]
            if self.axis == "time" and self.compat:
                x = x + conv(x.reshape(grid)).reshape(x.shape)  # positions and times are both shuffled
            else:
                x = x + rearrange(conv(rearrange(x, back, **sizes)), rows)
            x = x + attend(x, bias)
            if context is not None:
                x = x + cross(x, context=context)
            x = x + feed(x)
        return rearrange(self.norm_out(x), back, **sizes)


class DeltaHead(nn.Module):
    """Reduce a frame's tokens to cells, whose difference is the latent action, and map it back to tokens.

    Args:
        dim: width of a token.
        cells: 1, 2, 4, 16, 64 or 256.
        layers: convolutions that reduce a frame's tokens to cells.
        width_in: values per cell before the bottleneck.
        width_out: values per cell after it.
        compat: whether the decoder's codes are mixed, as published.
    """

    def __init__(
        self, dim: int, cells: int, layers: tuple, width_in: int, width_out: int, compat: bool
    ) -> None:
        super().__init__()
        self.cells, self.compat = cells, compat
        self.project_in, self.project_out = nn.Linear(dim, width_in), nn.Linear(width_out, dim)
        modules: list[nn.Module] = []
        for kernel, stride, padding in layers:
            modules += [nn.Conv2d(width_in, width_in, kernel, stride, padding), nn.ReLU()]
        self.cnn_encoder = nn.Sequential(*modules[:-1])
        self.cnn_encoder[-1].bias.requires_grad_(False)  # it cancels in the difference

    def forward(self, tokens: Float[Tensor, "b 2 h w d"]) -> Float[Tensor, "b f"]:
        """Return the second frame's cells minus the first's, flattened."""
        with torch.autocast(tokens.device.type, enabled=False):
            x = rearrange(self.project_in(tokens.float()), "b t h w c -> (b t) c h w")
            first, second = rearrange(self.cnn_encoder(x), "(b t) c h w -> t b (h w c)", t=2)
        return second - first

    def context(self, latent: Float[Tensor, "b f"]) -> Float[Tensor, "b cells d"]:
        """Return a latent action as tokens for the decoder."""
        split = "b (c k) -> b k c" if self.compat else "b (k c) -> b k c"
        return self.project_out(rearrange(latent, split, k=self.cells))


class CViViT(nn.Module):
    """Encoder and decoder around a bottleneck that the caller applies.

    Args:
        dim: width of a token.
        heads: attention heads.
        head_dim: width of a head.
        spatial_depth: layers of the spatial transformers.
        temporal_depth: layers of the temporal transformer.
        patch: side of a patch in pixels.
        cells: cells of the latent action.
        layers: convolutions that reduce a frame's tokens to cells.
        width_in: values per cell before the bottleneck.
        width_out: values per cell after it.
        compat: whether to reproduce the deviations of the published code.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        head_dim: int,
        spatial_depth: int,
        temporal_depth: int,
        patch: int,
        cells: int,
        layers: tuple,
        width_in: int,
        width_out: int,
        compat: bool,
    ) -> None:
        super().__init__()
        self.compat, patch_dim = compat, 3 * patch * patch
        sizes = {"heads": heads, "head_dim": head_dim, "compat": compat}
        self.spatial_rel_pos_bias = PositionBias(dim, heads)
        self.to_patch_emb_first_frame = nn.Sequential(
            Rearrange("b t c (h p) (w q) -> b t h w (c p q)", p=patch, q=patch),
            nn.LayerNorm(patch_dim) if compat else nn.Identity(),
            nn.Linear(patch_dim, dim),
            nn.LayerNorm(dim),
        )
        self.enc_spatial_transformer = Transformer(dim, spatial_depth, axis="space", **sizes)
        self.enc_temporal_transformer = Transformer(dim, temporal_depth, axis="time", **sizes)
        self.vq = DeltaHead(dim, cells, layers, width_in, width_out, compat)
        self.dec_spatial_transformer = Transformer(dim, spatial_depth, axis="space", cross=True, **sizes)
        self.to_pixels_first_frame = nn.Sequential(
            nn.Linear(dim, patch_dim), Rearrange("b h w (c p q) -> b c (h p) (w q)", p=patch, q=patch)
        )

    def patches(self, pixels: Float[Tensor, "b t 3 y x"]) -> Float[Tensor, "b t h w d"]:
        """Return the patch embedding of frames in 0..1."""
        return self.to_patch_emb_first_frame(pixels)

    def bias(self, patches: Float[Tensor, "b t h w d"]) -> Float[Tensor, "heads n n"]:
        """Return the attention bias for `spatial_tokens` and `decode`; the same for every frame."""
        return self.spatial_rel_pos_bias(*patches.shape[2:4])

    def spatial_tokens(
        self, patches: Float[Tensor, "b t h w d"], bias: Float[Tensor, "heads n n"]
    ) -> Float[Tensor, "b t h w d"]:
        """Return spatial tokens; with `compat`, a frame's tokens also depend on earlier frames."""
        if self.compat:
            return self.enc_spatial_transformer(patches, bias)
        each = self.enc_spatial_transformer(patches.flatten(0, 1).unsqueeze(1), bias)
        return each.reshape(patches.shape)

    def delta(self, tokens: Float[Tensor, "b 2 h w d"]) -> Float[Tensor, "b f"]:
        """Return the latent action before the bottleneck from the spatial tokens of two frames."""
        return self.vq(self.enc_temporal_transformer(tokens))

    def decode(
        self,
        patches: Float[Tensor, "b 1 h w d"],
        latent: Float[Tensor, "b f"],
        bias: Float[Tensor, "heads n n"],
    ) -> Float[Tensor, "b 3 y x"]:
        """Return the next frame, about 0..1, from the patches of the current one."""
        tokens = self.dec_spatial_transformer(patches, bias, self.vq.context(latent))
        return self.to_pixels_first_frame(tokens[:, 0])
