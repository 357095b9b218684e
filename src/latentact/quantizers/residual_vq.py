"""Residual vector quantization (arXiv 2107.03312), by vector-quantize-pytorch: codebooks refine each other.

The latent action is the sum of the entries. It is split into as many tokens as codes only to fit the
contract: no token corresponds to a single code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from vector_quantize_pytorch import ResidualVQ

from latentact.config import Fraction
from latentact.quantizers.quantizer import QUANTIZERS, BottleneckConfig, Quantized, Quantizer, Size
from latentact.quantizers.usage import usage


@QUANTIZERS.register("residual_vq")
@dataclass(frozen=True, kw_only=True)
class ResidualVqConfig(BottleneckConfig):
    """Settings of residual VQ."""

    kind: str = "residual_vq"
    """Registered name."""
    dim: Size = 128
    """Dimensions of a latent action."""
    codebooks: Size = 2
    """Number of codebooks that refine each other."""
    codebook_size: Size = 64
    """Entries per codebook."""
    beta: float = 0.25
    """Weight of the commitment loss."""
    decay: Fraction = 0.999
    """Decay of the moving averages, per training step."""
    guard: bool = False
    """Whether unused codes restart from current features."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        super().__post_init__()
        self._check_tokens(self.dim, self.codebooks * self.positions)

    def build(self) -> ResidualVq:
        """Return the bottleneck with an initial codebook."""
        return ResidualVq(self)


class ResidualVq(Quantizer):
    """`positions` vectors, each the sum of one entry of each of `codebooks` codebooks."""

    def __init__(self, config: ResidualVqConfig) -> None:
        super().__init__()
        self.positions = config.positions
        self.in_features, self.tokens = config.dim, config.codebooks * config.positions
        self.token_dim = config.dim // self.tokens
        self.codebook_size = self.size = config.codebook_size
        self.vq = ResidualVQ(
            dim=config.dim // config.positions,
            num_quantizers=config.codebooks,
            codebook_size=config.codebook_size,
            decay=config.decay,
            commitment_weight=config.beta,
            threshold_ema_dead_code=1 if config.guard else 0,
        )

    def forward(self, x: Float[Tensor, "b i"]) -> Quantized:
        """Quantize the features, then the residual, and so on; in training mode update the codebooks."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            vectors, codes, losses = self.vq(rearrange(x, "b (h d) -> b h d", h=self.positions))
        used = F.one_hot(codes.flatten(0, 1).T, self.size).float().sum(1)
        return Quantized(
            vectors=vectors.flatten(1),
            continuous=x,
            codes=codes.flatten(1),
            loss=losses.sum(),
            metrics=usage(used),
        )

    def _codebook(self) -> Tensor:
        entries: Any = self.vq.codebooks  # [q, m, d]
        q, m, d = entries.shape
        found = entries.new_zeros(self.positions, q, m, self.positions, d)
        for position in range(self.positions):
            found[position, :, :, position] = entries
        return found.flatten(3).flatten(0, 1)
