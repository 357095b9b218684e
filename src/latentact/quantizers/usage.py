"""How much of a codebook is used, and a guard that restarts dead codes.

Where features lie far from a codebook, one entry is nearest to all of them, and the others are never chosen
and never learn; LAPA's LAQ is reported to end there when trained from scratch. The guard counts uses over
`PERIOD` steps, puts unused entries onto current features, and says how many it has restarted. All of it stays
on the device; its state is saved with the model, so that a resumed run goes on exactly.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

PERIOD = 50  # steps
DEAD = 0.01  # of its fair share


def across_ranks(counts: Tensor) -> Tensor:
    """Return the sum over all processes that train together."""
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
    """Return the perplexity and the share of codes used of a batch, mean over codebooks.

    Args:
        used: how often each code of each codebook was chosen.
    """
    share = used / used.sum(-1, keepdim=True).clamp(min=1)
    entropy = -(share * torch.log(share + 1e-10)).sum(-1)
    return {"perplexity": entropy.exp().mean(), "usage": (used > 0).float().mean()}


class UsageGuard(nn.Module):
    """Finds dead codes and what to replace them by.

    Args:
        codebooks: how many.
        size: entries of each.
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
        """Return which entries to replace now and by what.

        Args:
            used: how often each code was chosen in this step, in this process.
            features: what was quantized.
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
