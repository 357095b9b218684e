"""The contract of bottlenecks: from features to latent actions, with codes if there is a codebook."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from latentact.config import Between, check_bounds
from latentact.errors import UserError
from latentact.registry import Registry

Size = Annotated[int, Between(1, 1 << 20)]
LARGEST = 1 << 22
"""Maximum number of values of `Quantizer.codebook`."""


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig(ABC):
    """Base of the settings of a bottleneck; each kind adds its own in its file."""

    REMOVED: ClassVar = (
        *("dim", "codebooks", "codebook_size", "commitment", "beta", "decay", "entropy", "levels"),
        *("weight", "guard"),
    )

    kind: str
    """Registered name: vq_ema, vq, nsvq, residual_vq, fsq, lfq, kl or none (whitened, no codes)."""
    positions: Size = 4
    """Vectors that share a codebook (kl, none: no effect); laq reduces a frame to that many cells."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        if self.kind != type(self).kind:
            raise UserError(f"{type(self).__name__}.kind must be {type(self).kind}, got {self.kind!r}.")
        check_bounds(self, "bottleneck.")

    def _check_tokens(self, dim: int, tokens: int) -> None:
        if dim % tokens:
            raise UserError(
                f"bottleneck.dim must be a multiple of the {tokens} tokens of {self.kind}, got {dim}."
            )

    @abstractmethod
    def build(self) -> Quantizer:
        """Return the bottleneck with an initial codebook."""


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

    # Outside compiled graphs, which may read a codebook after its update (torch 2.11).
    __call__: Callable[..., Any] = torch.compiler.disable(nn.Module.__call__)

    @abstractmethod
    def forward(self, x: Float[Tensor, "b i"]) -> Quantized:
        """Return latent actions for features."""

    def codebook(self) -> Float[Tensor, "k m f"] | None:
        """Return what each code of each token adds to a latent action; None without codes, or if very large.

        The vectors of a latent action are the sum of the entries of its codes, flattened to f = k x d values.
        """
        if self.codebook_size is None or self.codebook_size * self.tokens**2 * self.token_dim > LARGEST:
            return None
        return self._codebook()

    def _codebook(self) -> Float[Tensor, "k m f"] | None:
        """Return the codebook of a bottleneck with codes; None if it is unknown."""
        return None


def per_token(entries: Float[Tensor, "m d"], tokens: int) -> Float[Tensor, "k m f"]:
    """Return the codebook of k tokens that share entries, each with its own d of the f = k x d values."""
    size, dim = entries.shape
    found = entries.new_zeros(tokens, size, tokens, dim)
    for token in range(tokens):
        found[token, :, token] = entries
    return found.flatten(2)


QUANTIZERS: Registry[type[BottleneckConfig]] = Registry("bottleneck", "latentact.quantizers")
