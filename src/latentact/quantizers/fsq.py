"""Finite scalar quantization (arXiv 2309.15505), by vector-quantize-pytorch: no codebook to collapse."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ

from latentact.errors import UserError
from latentact.quantizers.quantizer import QUANTIZERS, BottleneckConfig, Quantized, Quantizer, per_token


@QUANTIZERS.register("fsq")
@dataclass(frozen=True, kw_only=True)
class FsqConfig(BottleneckConfig):
    """Settings of FSQ; a latent action has positions x len(levels) dimensions."""

    kind: str = "fsq"
    """Registered name."""
    levels: tuple[int, ...] = (8, 5, 5, 5)
    """Values per dimension of a token."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        super().__post_init__()
        if min(self.levels, default=0) < 2 or math.prod(self.levels) > 1 << 30:
            raise UserError(
                f"bottleneck.levels must be at least 2 per dimension and give at most {1 << 30} codes, got "
                f"{list(self.levels)}."
            )

    def build(self) -> Fsq:
        """Return the bottleneck."""
        return Fsq(self)


class Fsq(Quantizer):
    """`positions` tokens of ``len(levels)`` rounded values each."""

    def __init__(self, config: FsqConfig) -> None:
        super().__init__()
        with torch.device("cpu"):  # its constructor computes, which needs a real device
            self.fsq = FSQ(list(config.levels), preserve_symmetry=2 in config.levels)
        # Features of an untrained network are so small that all would round to the same code.
        self.norm = nn.BatchNorm1d(config.positions * len(config.levels), affine=False)
        self.tokens, self.token_dim = config.positions, len(config.levels)
        self.in_features = self.tokens * self.token_dim
        self.codebook_size = math.prod(config.levels)

    def forward(self, x: Float[Tensor, "b i"]) -> Quantized:
        """Round each dimension to its levels, with a straight-through gradient."""
        with torch.autocast(x.device.type, enabled=False):
            x = self.norm(x.float())
            tokens = rearrange(x, "b (k d) -> b k d", k=self.tokens)
            vectors, codes = self.fsq(tokens)
        return Quantized(
            vectors=vectors.flatten(1), continuous=x, codes=codes.long(), loss=vectors.new_zeros(())
        )

    def _codebook(self) -> Tensor:
        codes = torch.arange(self.codebook_size or 0, device=next(self.buffers()).device)
        return per_token(self.fsq.indices_to_codes(codes), self.tokens)
