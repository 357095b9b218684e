"""No quantizer: continuous features, whitened per dimension so that they cannot collapse to a constant.

LAOM (arXiv 2502.00379) and CLAM (arXiv 2505.04999) report that quantization hurts continuous control; the
batch normalization without affine parameters is ours and keeps each dimension at zero mean and unit variance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latentact.quantizers.quantizer import QUANTIZERS, BottleneckConfig, Quantized, Quantizer, Size


@QUANTIZERS.register("none")
@dataclass(frozen=True, kw_only=True)
class WhitenedConfig(BottleneckConfig):
    """Settings of whitened features."""

    kind: str = "none"
    """Registered name."""
    dim: Size = 128
    """Dimensions of a latent action."""

    def build(self) -> Whitened:
        """Return the bottleneck."""
        return Whitened(self)


class Whitened(Quantizer):
    """Batch-normalized features without codes."""

    def __init__(self, config: WhitenedConfig) -> None:
        super().__init__()
        self.in_features = self.token_dim = config.dim
        self.tokens, self.codebook_size = 1, None
        self.norm = nn.BatchNorm1d(config.dim, affine=False)

    def forward(self, x: Float[Tensor, "b i"]) -> Quantized:
        """Whiten; in evaluation with the training data's statistics."""
        with torch.autocast(x.device.type, enabled=False):
            z = self.norm(x.float())
        return Quantized(vectors=z, continuous=z, codes=None, loss=z.new_zeros(()))
