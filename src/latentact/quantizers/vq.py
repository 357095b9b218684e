"""Vector quantizer with a codebook trained by gradient (arXiv 1711.00937), as in villa-X.

One codebook for all tokens; the loss moves features to their entries with weight `beta` and entries to their
features with weight 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from latentact.quantizers.quantizer import QUANTIZERS, BottleneckConfig, Quantized, Quantizer, Size, per_token
from latentact.quantizers.usage import UsageGuard, usage


@QUANTIZERS.register("vq")
@dataclass(frozen=True, kw_only=True)
class VqConfig(BottleneckConfig):
    """Settings of VQ by gradient."""

    kind: str = "vq"
    """Registered name."""
    dim: Size = 128
    """Dimensions of a latent action."""
    codebook_size: Size = 64
    """Number of codebook entries."""
    beta: float = 0.25
    """Weight of the commitment loss."""
    guard: bool = False
    """Whether unused codes restart from current features."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        super().__post_init__()
        self._check_tokens(self.dim, self.positions)

    def build(self) -> Vq:
        """Return the bottleneck with an initial codebook."""
        return Vq(self)


class Vq(Quantizer):
    """`positions` tokens that share a codebook, parameter `embedding.weight` [m, d]."""

    def __init__(self, config: VqConfig) -> None:
        super().__init__()
        self.beta = config.beta
        self.in_features, self.tokens = config.dim, config.positions
        self.token_dim = config.dim // config.positions
        self.codebook_size = config.codebook_size
        self.embedding = nn.Embedding(config.codebook_size, self.token_dim)
        nn.init.uniform_(self.embedding.weight, -1 / config.codebook_size, 1 / config.codebook_size)
        self.guard = UsageGuard(1, config.codebook_size) if config.guard else None

    def forward(self, x: Float[Tensor, "b i"]) -> Quantized:
        """Take the nearest entries, with a straight-through gradient."""
        with torch.autocast(x.device.type, enabled=False):
            return self._quantize(x.float())

    def _codebook(self) -> Tensor:
        return per_token(self.embedding.weight, self.tokens)

    def _quantize(self, x: Tensor) -> Quantized:
        flat, codebook = rearrange(x, "b (k d) -> (b k) d", k=self.tokens), self.embedding.weight
        codes = nearest(flat, codebook)
        chosen = self.embedding(codes)
        loss = self.beta * F.mse_loss(flat, chosen.detach()) + F.mse_loss(chosen, flat.detach())
        used = F.one_hot(codes, len(codebook)).to(x.dtype).sum(0, keepdim=True)
        metrics = usage(used)
        if self.training and self.guard:
            dead, drawn = self.guard(used, flat.detach().unsqueeze(0))
            codebook.data.copy_(torch.where(dead, drawn, codebook.data)[0])
            metrics["restarted"] = self.guard.restarted.float()
        vectors = rearrange(chosen.detach(), "(b k) d -> b (k d)", k=self.tokens)
        return Quantized(
            vectors=vectors + (x - x.detach()),
            continuous=x,
            codes=rearrange(codes, "(b k) -> b k", k=self.tokens),
            loss=loss,
            metrics=metrics,
        )


@torch.no_grad()
def nearest(x: Float[Tensor, "n d"], codebook: Float[Tensor, "m d"]) -> Tensor:
    """Return the index of the nearest entry (squared distance) of every row."""
    return (x.square().sum(1, keepdim=True) - 2 * (x @ codebook.T) + codebook.square().sum(1)).argmin(1)
