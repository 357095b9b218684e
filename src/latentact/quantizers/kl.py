"""Variational bottleneck with a unit Gaussian prior, as in AdaWorld (arXiv 2503.18938)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from latentact.quantizers.quantizer import QUANTIZERS, BottleneckConfig, Quantized, Quantizer, Size


@QUANTIZERS.register("kl")
@dataclass(frozen=True, kw_only=True)
class KlConfig(BottleneckConfig):
    """Settings of the variational bottleneck."""

    kind: str = "kl"
    """Registered name."""
    dim: Size = 128
    """Dimensions of a latent action."""
    weight: float = 1e-3
    """Weight of the divergence from a unit Gaussian."""

    def build(self) -> Kl:
        """Return the bottleneck."""
        return Kl(self)


class Kl(Quantizer):
    """Return a sample from mean and log-variance in training, the mean in evaluation."""

    def __init__(self, config: KlConfig) -> None:
        super().__init__()
        self.weight = config.weight
        self.in_features, self.token_dim = 2 * config.dim, config.dim
        self.tokens, self.codebook_size = 1, None

    def forward(self, x: Float[Tensor, "b i"]) -> Quantized:
        """Sample around the mean; the loss is the weighted divergence, summed over dimensions."""
        mean, log_variance = x.float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-10, 10)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
        noise = torch.randn_like(mean) * (log_variance / 2).exp() if self.training else 0.0
        return Quantized(
            vectors=mean + noise,
            continuous=mean,
            codes=None,
            loss=self.weight * divergence,
            metrics={"kl": divergence.detach()},
        )
