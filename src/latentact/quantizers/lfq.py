"""Lookup-free quantization (arXiv 2310.05737), by vector-quantize-pytorch: codes are signs of features."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from vector_quantize_pytorch import LFQ

from latentact.errors import UserError
from latentact.quantizers.quantizer import QUANTIZERS, BottleneckConfig, Quantized, Quantizer, Size, per_token
from latentact.quantizers.usage import usage


@QUANTIZERS.register("lfq")
@dataclass(frozen=True, kw_only=True)
class LfqConfig(BottleneckConfig):
    """Settings of LFQ; a latent action has positions x log2(codebook_size) dimensions."""

    kind: str = "lfq"
    """Registered name."""
    codebook_size: Size = 64
    """Number of codes, a power of two."""
    entropy: float = 0.1
    """Weight of the entropy loss."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        super().__post_init__()
        if self.codebook_size < 2 or self.codebook_size.bit_count() != 1:
            raise UserError(
                f"bottleneck.codebook_size must be a power of two for lfq, got {self.codebook_size}."
            )

    def build(self) -> Lfq:
        """Return the bottleneck."""
        return Lfq(self)


class Lfq(Quantizer):
    """`positions` tokens of log2(codebook_size) signs each."""

    def __init__(self, config: LfqConfig) -> None:
        super().__init__()
        self.tokens, self.token_dim = config.positions, int(math.log2(config.codebook_size))
        self.codebook_size = config.codebook_size
        self.in_features = self.tokens * self.token_dim
        # Features of an untrained network may all have the same sign; whitened ones do not.
        self.norm = nn.BatchNorm1d(self.in_features, affine=False)
        with torch.device("cpu"):  # its constructor computes, which needs a real device
            self.lfq = LFQ(dim=self.token_dim, entropy_loss_weight=config.entropy)

    def forward(self, x: Float[Tensor, "b i"]) -> Quantized:
        """Take signs; the loss rewards confident features and uniform use of codes."""
        with torch.autocast(x.device.type, enabled=False):
            x = self.norm(x.float())
            vectors, codes, loss = self.lfq(rearrange(x, "b (k d) -> b k d", k=self.tokens))
        used = F.one_hot(codes.flatten(), 2**self.token_dim).float().sum(0, keepdim=True)
        return Quantized(
            vectors=vectors.flatten(1), continuous=x, codes=codes.long(), loss=loss, metrics=usage(used)
        )

    def _codebook(self) -> Tensor:
        codes = torch.arange(self.codebook_size or 0, device=next(self.buffers()).device)
        return per_token(self.lfq.indices_to_codes(codes), self.tokens)
