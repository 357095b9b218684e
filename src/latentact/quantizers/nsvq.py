"""Noise substitution in vector quantization (Vali and Backstrom, IEEE Access 2022), as in LAPA's LAQ.

In training the quantized vector is the feature plus noise as large as its distance to the nearest entry: the
gradient reaches features and codebook without further losses. In evaluation it is the entry itself.
Rarely used entries are replaced by used ones on LAPA's schedule; unlike its code, all processes of a
distributed run share counts and codebook, and counts are saved. With `guard`, entries are restarted from
features instead: the published replacements are so close to an entry that they are never selected.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from latentact.quantizers.quantizer import QUANTIZERS, BottleneckConfig, Quantized, Quantizer, Size, per_token
from latentact.quantizers.usage import UsageGuard, across_ranks, agreed, usage
from latentact.quantizers.vq import nearest

EPSILON = 1e-12
UNUSED = 0.1  # uses per sample of the last batch, since the last replacement


@QUANTIZERS.register("nsvq")
@dataclass(frozen=True, kw_only=True)
class NsvqConfig(BottleneckConfig):
    """Settings of NSVQ."""

    kind: str = "nsvq"
    """Registered name."""
    dim: Size = 128
    """Dimensions of a latent action."""
    codebook_size: Size = 64
    """Number of codebook entries."""
    guard: bool = False
    """Whether unused codes restart from current features."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        super().__post_init__()
        self._check_tokens(self.dim, self.positions)

    def build(self) -> Nsvq:
        """Return the bottleneck with an initial codebook."""
        return Nsvq(self)


class Nsvq(Quantizer):
    """`positions` tokens that share a codebook, parameter `codebooks` [m, d]; buffers `used` and `step`."""

    used: Tensor
    step: Tensor

    def __init__(self, config: NsvqConfig) -> None:
        super().__init__()
        self.in_features, self.tokens = config.dim, config.positions
        self.token_dim = config.dim // config.positions
        self.codebook_size = config.codebook_size
        self.codebooks = nn.Parameter(torch.randn(config.codebook_size, self.token_dim))
        self.guard = UsageGuard(1, config.codebook_size) if config.guard else None
        self.register_buffer("used", torch.zeros(config.codebook_size))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Float[Tensor, "b i"]) -> Quantized:
        """Substitute noise in training; take the nearest entries in evaluation."""
        with torch.autocast(x.device.type, enabled=False):
            return self._quantize(x.float())

    def _codebook(self) -> Tensor:
        return per_token(self.codebooks, self.tokens)

    def _quantize(self, x: Tensor) -> Quantized:
        flat = rearrange(x, "b (k d) -> (b k) d", k=self.tokens)
        codes = nearest(flat, self.codebooks)
        vectors = self.codebooks[codes]
        counts = F.one_hot(codes, len(self.codebooks)).to(x.dtype).sum(0)
        metrics = usage(counts.unsqueeze(0))
        if self.training:
            noise = torch.randn_like(flat)
            scale = (flat - vectors).norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
            vectors = flat + (scale + EPSILON) * noise
            if self.guard:
                dead, drawn = self.guard(counts.unsqueeze(0), flat.detach().unsqueeze(0))
                self.codebooks.data.copy_(torch.where(dead, drawn, self.codebooks.data)[0])
                metrics["restarted"] = self.guard.restarted.float()
            else:
                self._replace(counts, len(x))
        return Quantized(
            vectors=rearrange(vectors, "(b k) d -> b (k d)", k=self.tokens),
            continuous=x,
            codes=rearrange(codes, "(b k) -> b k", k=self.tokens),
            loss=x.new_zeros(()),
            metrics=metrics,
        )

    @torch.no_grad()
    def _replace(self, counts: Tensor, batch: int) -> None:
        """Replace rarely used entries by used ones at steps 10, 20 .. 100, 200 .. 1000, 1500 .. 4500."""
        step = self.step.clone()
        self.step += 1
        self.used += across_ranks(counts)
        early, later = (step < 100) & (step % 10 == 0), (step < 1000) & (step % 100 == 0)
        due = (step > 0) & (early | later | ((step < 5000) & (step % 500 == 0)))
        alive = self.used >= UNUSED * across_ranks(counts.new_full((), float(batch)))
        among, total = (~alive).long().argsort(stable=True), alive.sum()
        turn = ((~alive).cumsum(0) - 1) % total.clamp(min=1)
        entries = self.codebooks.data
        copies = torch.where((total > 0) & ~alive[:, None], entries[among[turn]], entries)
        moved = copies + EPSILON * torch.randn_like(copies) * ~(alive & (total > 0))[:, None]
        self.codebooks.data.copy_(torch.where(due, agreed(moved), entries))
        self.used *= ~due
