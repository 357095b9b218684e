"""Spatio-temporal transformer of villa-X's latent action model (arXiv 2507.23682, `lam/` of its repository).

Parameter names are the published ones. Kept from the published code: one gate for spatial and temporal
attention, temporal attention on the raw residual stream, temporal positions at the first layer only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn


def sincos(dim: int, positions: Float[Tensor, " n"]) -> Float[Tensor, "n d"]:
    """Return sines, then cosines, of the positions at `dim / 2` wavelengths up to 10000."""
    angles = positions[:, None] / 10000 ** (torch.arange(dim // 2) / (dim // 2))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_grid(dim: int, side: int) -> Float[Tensor, "n d"]:
    """Return position embeddings of a square grid, row by row: half of the dimensions for x, half for y."""
    y, x = torch.meshgrid(torch.arange(side).float(), torch.arange(side).float(), indexing="ij")
    return torch.cat([sincos(dim // 2, x.flatten()), sincos(dim // 2, y.flatten())], dim=1)


def linear(
    x: Float[Tensor, "*n i"], weight: Tensor, bias: Tensor, gelu: bool = False
) -> Float[Tensor, "*n o"]:
    """Return a linear layer's output, optionally after a GELU (tanh).

    On CPUs without gradients it uses oneDNN, which is faster than the default and fuses the GELU.
    """
    plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if plain and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")) and _ONEDNN:
        kind, approximation = ("gelu", "tanh") if gelu else ("none", "")
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, kind, [], approximation)
    y = F.linear(x, weight, bias)
    return F.gelu(y, approximate="tanh") if gelu else y


_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class RmsNorm(nn.Module):
    """Divide by the root mean square, scale by `g`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized features."""
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        return x / size.clamp(min=1e-8) * self.g


class SwishGlu(nn.Module):
    """One linear layer split into values and their gate."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.project = nn.Linear(dim, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Return values times SiLU of the gate."""
        values, gate = self.project(x).chunk(2, dim=-1)
        return values * F.silu(gate)


class PatchEmbed(nn.Module):
    """Embed an image as one token per patch, row by row."""

    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        """Return the tokens."""
        return self.proj(x).flatten(2).transpose(1, 2)


class SelfAttention(nn.Module):
    """Attention along one of the two token axes of `[w, t, n, d]`, from one fused projection."""

    def __init__(self, dim: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(dim // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def spatial(self, x: Float[Tensor, "w t n d"]) -> Float[Tensor, "w t n d"]:
        """Attend to all patches of the same frame."""
        q, k, v = (rearrange(y, "w t n h d -> (w t) h n d") for y in self._split(x, x.shape[1]))
        out = F.scaled_dot_product_attention(q, k, v)
        out = rearrange(out, "(w t) h n d -> w t n (h d)", w=len(x))
        return linear(out, self.proj.weight, self.proj.bias)

    def temporal(self, x: Float[Tensor, "w t n d"], keep: int) -> Float[Tensor, "w k n d"]:
        """Attend to the same patch of this and earlier frames; only the last `keep` frames have queries."""
        t = x.shape[1]
        q, k, v = (rearrange(y, "w t n h d -> (w n) h t d") for y in self._split(x, keep))
        if keep == t:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            mask = torch.ones(keep, t, dtype=torch.bool, device=x.device).tril(t - keep)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out = rearrange(out, "(w n) h t d -> w t n (h d)", w=len(x))
        return linear(out, self.proj.weight, self.proj.bias)

    def _split(self, x: Float[Tensor, "w t n d"], keep: int) -> list[Float[Tensor, "w t2 n h e"]]:
        """Return queries of the last `keep` frames, keys and values; three separate products avoid copies."""
        inputs = (x[:, -keep:], x, x)
        weights, biases = self.qkv.weight.chunk(3), self.qkv.bias.chunk(3)
        norms = (self.q_norm, self.k_norm, nn.Identity())
        return [
            norm(linear(y, weight, bias).unflatten(-1, (self.heads, -1)))
            for y, weight, bias, norm in zip(inputs, weights, biases, norms, strict=True)
        ]


class Mlp(nn.Module):
    """Two linear layers with a GELU (tanh) between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features, same shape."""
        hidden = linear(x, self.fc1.weight, self.fc1.bias, gelu=True)
        return linear(hidden, self.fc2.weight, self.fc2.bias)


class StBlock(nn.Module):
    """Spatial attention, causal temporal attention, MLP; shifts, scales and gates are learned constants."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, qk_norm: bool) -> None:
        super().__init__()
        self.attn = SelfAttention(dim, heads, qk_norm)
        self.attn_temp = SelfAttention(dim, heads, qk_norm)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def spatial(self, x: Float[Tensor, "w t n d"]) -> Float[Tensor, "w t n d"]:
        """Return the output of the block's per-frame part, spatial attention."""
        shift, scale, gate, *_ = self.scale_shift_table
        return torch.addcmul(x, gate, self.attn.spatial(_modulated(x, shift, scale)))

    def temporal(
        self, x: Float[Tensor, "w t n d"], keep: int, positions: Float[Tensor, "t d"] | None = None
    ) -> Float[Tensor, "w k n d"]:
        """Return the rest of the block for the last `keep` frames of windows."""
        _, _, gate, shift, scale, mlp_gate = self.scale_shift_table
        normed = x if positions is None else x + positions[:, None]
        x = torch.addcmul(x[:, -keep:], gate, self.attn_temp.temporal(normed, keep))
        return torch.addcmul(x, mlp_gate, self.mlp(_modulated(x, shift, scale)))


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], 1 + scale, shift, 1e-6)


class Attention(nn.Module):
    """Attention with separate projections of queries and of keys and values."""

    def __init__(self, dim: int, heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.kv = nn.Linear(dim, 2 * dim)
        self.q = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        if qk_norm:
            self.q_layernorm = nn.LayerNorm(dim // heads)
            self.k_layernorm = nn.LayerNorm(dim // heads)
        self.qk_norm = qk_norm

    def forward(self, q: Float[Tensor, "b i d"], kv: Float[Tensor, "b j d"]) -> Float[Tensor, "b i d"]:
        """Return the attention output of the queries."""
        q = rearrange(self.q(q), "b i (h d) -> b h i d", h=self.heads)
        k, v = rearrange(self.kv(kv), "b j (m h d) -> m b h j d", m=2, h=self.heads)
        if self.qk_norm:
            q, k = self.q_layernorm(q), self.k_layernorm(k)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h i d -> b i (h d)"))


class AttentionPool(nn.Module):
    """Pool tokens into a few latents: learned queries, attention and MLP, each followed by a norm."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, latents: int, out_dim: int) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.latents = nn.Parameter(torch.randn(latents, dim) * 0.02)
        self.pre_projection = nn.Linear(dim, dim)
        self.attn = Attention(dim, heads)
        self.attn_norm, self.mlp_norm = RmsNorm(dim), RmsNorm(dim)
        self.mlp = nn.Sequential(SwishGlu(dim, hidden), nn.Linear(hidden, dim))
        self.final_proj = nn.Sequential(nn.Linear(dim, out_dim))

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b k o"]:
        """Return the latents of each row."""
        latents = self.latents.expand(len(x), -1, -1)
        latents = self.attn_norm(latents + self.attn(latents, self.pre_projection(x)))
        return self.final_proj(self.mlp_norm(latents + self.mlp(latents)))


class _Scale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DecoderBlock(nn.Module):
    """Pre-norm transformer block with scaled branches."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, qk_norm: bool) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.pre_norm_attn, self.pre_norm_mlp = RmsNorm(dim), RmsNorm(dim)
        self.attn = Attention(dim, heads, qk_norm)
        self.layer_scale_attn, self.layer_scale_mlp = _Scale(dim), _Scale(dim)
        self.mlp = nn.Sequential(SwishGlu(dim, hidden), nn.Identity(), nn.Linear(hidden, dim))

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Return the tokens after attention and MLP."""
        normed = self.pre_norm_attn(x)
        x = x + self.layer_scale_attn(self.attn(normed, normed))
        return x + self.layer_scale_mlp(self.mlp(self.pre_norm_mlp(x)))


class StEncoder(nn.Module):
    """Encode windows of frames as latents of their transitions.

    Args:
        size: height and width of a frame in pixels.
        patch: side of a patch in pixels.
        frames: maximum length of a window.
        dim: width of a token.
        depth: blocks.
        heads: attention heads of the blocks.
        mlp_ratio: hidden width of the MLPs, in multiples of `dim`.
        qk_norm: whether queries and keys of the blocks are normalized.
        pool_heads: attention heads of the pooling.
        latents: latents per transition.
        out_dim: dimensions per latent.
    """

    pe_spatial: Tensor
    pe_temporal: Tensor

    def __init__(
        self,
        *,
        size: int,
        patch: int,
        frames: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        qk_norm: bool,
        pool_heads: int,
        latents: int,
        out_dim: int,
    ) -> None:
        super().__init__()
        self.embed = PatchEmbed(patch, dim)
        self.register_buffer("pe_spatial", sincos_grid(dim, size // patch)[None])
        self.register_buffer("pe_temporal", sincos(dim, torch.arange(frames).float())[None])
        self.layers = nn.ModuleList(StBlock(dim, heads, mlp_ratio, qk_norm) for _ in range(depth))
        self.norm = RmsNorm(dim)
        self.map_block = AttentionPool(dim, pool_heads, mlp_ratio, latents, out_dim)

    def stem(self, frames: Float[Tensor, "f 3 h w"]) -> Float[Tensor, "f n d"]:
        """Return the per-frame part of the encoder, which all windows of a frame share."""
        x = self.embed(frames) + self.pe_spatial
        return self.layers[0].spatial(x[:, None])[:, 0]  # type: ignore[operator]

    def forward(self, x: Float[Tensor, "w t n d"], keep: int) -> Float[Tensor, "w k2 l o"]:
        """Return the latents of the last `keep - 1` transitions of windows of stems."""
        blocks, positions = len(self.layers), self.pe_temporal[0, : x.shape[1]]
        for i, layer in enumerate(self.layers):
            x = layer.spatial(x) if i else x  # type: ignore[operator]
            kept = keep if i == blocks - 1 else x.shape[1]
            x = layer.temporal(x, kept, None if i else positions)  # type: ignore[operator]
        x = self.norm(x)
        between = (x[:, 1:] + x[:, :-1]) / 2
        return self.map_block(between.flatten(0, 1)).unflatten(0, between.shape[:2])


class StDecoder(nn.Module):
    """Map one frame and a latent action to the patches of the next frame; arguments as in `StEncoder`."""

    pe: Tensor

    def __init__(
        self,
        *,
        size: int,
        patch: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        qk_norm: bool,
        latent_dim: int,
    ) -> None:
        super().__init__()
        self.embed = PatchEmbed(patch, dim)
        self.register_buffer("pe", sincos_grid(dim, size // patch)[None])
        self.action_embed = nn.Linear(latent_dim, dim)
        self.layers = nn.ModuleList(DecoderBlock(dim, heads, mlp_ratio, qk_norm) for _ in range(depth))
        self.norm = RmsNorm(dim)
        self.pred_head = nn.Linear(dim, 3 * patch * patch)

    def forward(
        self, frames: Float[Tensor, "b 3 h w"], latent: Float[Tensor, "b d"]
    ) -> Float[Tensor, "b n p"]:
        """Return one row of pixels per patch, in the order (row, column, channel)."""
        x = torch.cat([self.action_embed(latent)[:, None], self.embed(frames) + self.pe], dim=1)
        for layer in self.layers:
            x = layer(x)
        return self.pred_head(self.norm(x)[:, 1:])
