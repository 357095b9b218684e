"""Vector quantizer with moving-average codebooks: LAPO's `VQEmbeddingEMA` (arXiv 2312.10812, models.py).

Kept from the published code: a feature vector of size ``codebooks x dim x positions`` is laid out so that
each quantized vector has *strided* elements (stride = positions); counts are Laplace-smoothed in place; the
codebook is updated after its use.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from latentact.config import Fraction
from latentact.quantizers.quantizer import QUANTIZERS, BottleneckConfig, Quantized, Quantizer, Size
from latentact.quantizers.usage import UsageGuard, usage

EPSILON = 1e-5


@QUANTIZERS.register("vq_ema")
@dataclass(frozen=True, kw_only=True)
class VqEmaConfig(BottleneckConfig):
    """Settings of VQ with moving averages. Defaults are LAPO's: 2 codebooks x 4 positions x 16 dims."""

    kind: str = "vq_ema"
    """Registered name."""
    dim: Size = 128
    """Dimensions of a latent action."""
    codebooks: Size = 2
    """Number of codebooks; each quantizes an equal part of the dimensions."""
    codebook_size: Size = 64
    """Entries per codebook."""
    commitment: float = 0.05
    """Weight of the commitment loss."""
    decay: Fraction = 0.999
    """Decay of the moving averages, per training step."""
    guard: bool = False
    """Whether unused codes restart from current features."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        super().__post_init__()
        self._check_tokens(self.dim, self.codebooks * self.positions)

    def build(self) -> VqEma:
        """Return the bottleneck with an initial codebook."""
        return VqEma(self)


class VqEma(Quantizer):
    """VQ with EMA codebooks; buffers `embedding`, `ema_weight` [n, m, d] and `ema_count` [n, m]."""

    embedding: Tensor
    ema_count: Tensor
    ema_weight: Tensor

    def __init__(self, config: VqEmaConfig) -> None:
        super().__init__()
        self.config = config
        self.positions = config.positions
        self.in_features = config.dim
        self.tokens = config.codebooks * config.positions
        self.token_dim = config.dim // self.tokens
        self.codebook_size = config.codebook_size
        limit = 5 / config.codebook_size
        embedding = torch.empty(config.codebooks, config.codebook_size, self.token_dim).uniform_(
            -limit, limit
        )
        self.register_buffer("embedding", embedding)
        self.register_buffer("ema_count", torch.zeros(embedding.shape[:2]))
        self.register_buffer("ema_weight", embedding.clone())
        self.guard = UsageGuard(config.codebooks, config.codebook_size) if config.guard else None

    def forward(self, x: Float[Tensor, "b i"]) -> Quantized:
        """Quantize; in training mode update the codebooks."""
        with torch.autocast(x.device.type, enabled=False):
            return self._quantize(x.float())

    def _codebook(self) -> Tensor:
        n, m, d = self.embedding.shape
        found = self.embedding.new_zeros(n, self.positions, m, n, d, self.positions)
        for i in range(n):
            for j in range(self.positions):
                found[i, j, :, i, :, j] = self.embedding[i]
        return found.flatten(3).flatten(0, 1)

    def _quantize(self, x: Tensor) -> Quantized:
        split = "b (n d h) -> n (b h) d"
        vectors = rearrange(x, split, n=len(self.embedding), h=self.positions)
        flat = vectors.detach()
        squares = self.embedding.square().sum(2).unsqueeze(1) + flat.square().sum(2, keepdim=True)
        indices = torch.baddbmm(squares, flat, self.embedding.transpose(1, 2), alpha=-2.0).argmin(-1)
        quantized = self.embedding.gather(1, repeat(indices, "n i -> n i d", d=self.token_dim))
        used = F.one_hot(indices, self.config.codebook_size).to(x.dtype)
        metrics = usage(used.sum(1))
        if self.training:
            self._update(flat, used)
            if self.guard:
                self._restart(*self.guard(used.sum(1), flat))
                metrics["restarted"] = self.guard.restarted.float()
        quantized = rearrange(quantized, "n (b h) d -> b (n d h)", h=self.positions)
        return Quantized(
            vectors=quantized + (x - x.detach()),
            continuous=x,
            codes=rearrange(indices, "n (b h) -> b (n h)", h=self.positions),
            loss=self.config.commitment * F.mse_loss(x, quantized),
            metrics=metrics,
        )

    @torch.no_grad()
    def _update(self, flat: Tensor, used: Tensor) -> None:
        decay, size = self.config.decay, self.config.codebook_size
        self.ema_count.mul_(decay).add_(used.sum(1), alpha=1 - decay)
        total = self.ema_count.sum(-1, keepdim=True)
        self.ema_count.add_(EPSILON).div_(total + size * EPSILON).mul_(total)
        self.ema_weight.mul_(decay).add_(used.transpose(1, 2) @ flat, alpha=1 - decay)
        self.embedding.copy_(self.ema_weight / self.ema_count.unsqueeze(-1))

    def _restart(self, dead: Tensor, drawn: Tensor) -> None:
        for buffer in (self.embedding, self.ema_weight):
            buffer.copy_(torch.where(dead, drawn, buffer))
        self.ema_count.copy_(torch.where(dead[..., 0], 1.0, self.ema_count))
