"""The contract of bottlenecks: from features to latent actions, with codes if there is a codebook."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from jaxtyping import Float, Int64
from torch import Tensor, nn

from latentact.errors import UserError
from latentact.registry import Registry


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig:
    """Settings of a bottleneck. Defaults are LAPO's: 2 codebooks x 4 positions x 16 dims = 128."""

    kind: str = "vq_ema"
    """Registered name: vq_ema, vq, nsvq, residual_vq, fsq, lfq, kl or none (whitened, no codes)."""
    dim: int = 128
    """Dims of a latent action (fsq: positions x len(levels); lfq: positions x log2(codebook_size))."""
    codebooks: int = 2
    """vq_ema: separate codebooks; residual_vq: codebooks that refine each other."""
    positions: int = 4
    """Vectors that share a codebook; unused by kl and none."""
    codebook_size: int = 64
    """Entries of each codebook; lfq: a power of two."""
    commitment: float = 0.05
    """vq_ema: weight of the commitment loss."""
    beta: float = 0.25
    """vq, residual_vq: weight of the commitment loss."""
    decay: float = 0.999
    """vq_ema, residual_vq: decay of the moving averages, per training step."""
    entropy: float = 0.1
    """lfq: weight of the entropy loss."""
    levels: tuple[int, ...] = (8, 5, 5, 5)
    """fsq: values per dimension."""
    weight: float = 1e-3
    """kl: weight of the divergence from a unit Gaussian."""
    guard: bool = False
    """vq_ema, vq, nsvq, residual_vq: whether unused codes restart from current features."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        for name in ("dim", "codebooks", "positions", "codebook_size"):
            if not 1 <= getattr(self, name) <= 1 << 20:
                raise UserError(
                    f"bottleneck.{name} must be between 1 and {1 << 20}, got {getattr(self, name)}."
                )
        if not 0 <= self.decay <= 1:
            raise UserError(f"bottleneck.decay must be between 0 and 1, got {self.decay:g}.")
        if min(self.levels, default=0) < 2 or math.prod(self.levels) > 1 << 30:
            raise UserError(
                f"bottleneck.levels must be at least 2 per dim and give at most {1 << 30} codes, got "
                f"{list(self.levels)}."
            )
        groups = {"vq": self.positions, "nsvq": self.positions}
        groups |= dict.fromkeys(("vq_ema", "residual_vq"), self.codebooks * self.positions)
        if self.kind in groups and (groups[self.kind] < 1 or self.dim % groups[self.kind]):
            raise UserError(
                f"bottleneck.dim must be a multiple of the {groups[self.kind]} tokens of {self.kind}, got "
                f"{self.dim}."
            )
        if self.kind == "lfq" and (self.codebook_size < 2 or self.codebook_size.bit_count() != 1):
            raise UserError(
                f"bottleneck.codebook_size must be a power of two for lfq, got {self.codebook_size}."
            )


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """Output of a bottleneck for a batch."""

    vectors: Float[Tensor, "b f"]
    """After the bottleneck, in the layout of the features."""
    continuous: Float[Tensor, "b f"]
    """Before quantization (kl: the mean), same layout."""
    codes: Int64[Tensor, "b k"] | None
    """Codebook indices, or None."""
    loss: Tensor
    """Scalar to add to the model's loss; 0 for bottlenecks without a loss."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Scalars on the features' device."""


class Quantizer(nn.Module, ABC):
    """A bottleneck; `forward` runs in float32 and in training mode may update its own statistics."""

    in_features: int
    """Size of its input."""
    tokens: int
    """k of its latent actions."""
    token_dim: int
    """d of its latent actions; the output has size k x d."""
    codebook_size: int | None
    """Number of codes, or None."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "b i"]) -> Quantized:
        """Return latent actions for features."""


QUANTIZERS: Registry[type[Quantizer]] = Registry("bottleneck", "latentact.quantizers")
