"""Codebook usage metrics, and a guard that restarts dead codes.

If features are far from a codebook, one entry is nearest to all of them, and the others are never selected
and never learn; LAPA's LAQ is reported to collapse like this when trained from scratch. The guard counts uses
over `PERIOD` steps, moves unused entries onto current features, and counts restarts. Its state stays on the
device and is saved with the model, so that a run resumes exactly.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

PERIOD = 50  # steps
DEAD = 0.01  # of the mean usage


def across_ranks(counts: Tensor) -> Tensor:
    """Return the sum over all training processes."""
    if _together():
        counts = counts.clone()
        torch.distributed.all_reduce(counts)
    return counts


def agreed(values: Tensor) -> Tensor:
    """Return the first process's values in every process, so that codebooks never differ."""
    if _together():
        values = values.contiguous()
        torch.distributed.broadcast(values, 0)
    return values


def _together() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def usage(used: Float[Tensor, "n m"]) -> dict[str, Tensor]:
    """Return perplexity and fraction of used codes of a batch, averaged over codebooks.

    Args:
        used: number of uses of each code of each codebook.
    """
    share = used / used.sum(-1, keepdim=True).clamp(min=1)
    entropy = -(share * torch.log(share + 1e-10)).sum(-1)
    return {"perplexity": entropy.exp().mean(), "usage": (used > 0).float().mean()}


class UsageGuard(nn.Module):
    """Find dead codes and their replacements.

    Args:
        codebooks: number of codebooks.
        size: entries per codebook.
    """

    step: Tensor
    window: Tensor
    restarted: Tensor

    def __init__(self, codebooks: int, size: int) -> None:
        super().__init__()
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("window", torch.zeros(codebooks, size))
        self.register_buffer("restarted", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(
        self, used: Float[Tensor, "n m"], features: Float[Tensor, "n i d"]
    ) -> tuple[Bool[Tensor, "n m 1"], Float[Tensor, "n m d"]]:
        """Return a mask of the entries to replace, and their replacements.

        Args:
            used: number of uses of each code in this step and process.
            features: the quantized features.
        """
        self.step += 1
        self.window += across_ranks(used)
        due = self.step % PERIOD == 0
        dead = due & (self.window <= DEAD * self.window.mean(1, keepdim=True))
        self.window *= ~due
        self.restarted += dead.sum()
        n, m = used.shape
        scores = torch.rand(n, max(m, features.shape[1]), device=used.device)
        chosen = scores.argsort(1)[:, :m] % features.shape[1]
        drawn = features.gather(1, chosen[..., None].expand(-1, -1, features.shape[2]))
        return dead.unsqueeze(-1), agreed(drawn)
