"""A latent action model that a policy looks through: never trained, never part of the policy's modules."""

from __future__ import annotations

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from latentact.lams.contract import load_lam


class FrozenLam:
    """A loaded LAM for windows of frames; not an `nn.Module`, so that no checkpoint of its owner holds it.

    Args:
        where: folder or hub id.

    Raises:
        UserError: it cannot be loaded.
    """

    def __init__(self, where: str) -> None:
        self._model = load_lam(where).requires_grad_(False)
        self.spec = self._model.spec

    def offsets(self, transitions: int, gap: int) -> list[int]:
        """Return the frames, relative to the current one, of the last transitions and the context before."""
        return [step * gap for step in range(-transitions - self._model.context, 1)]

    @torch.no_grad()
    def tokens(
        self, frames: UInt8[Tensor, "b t c h w"], transitions: int, quantized: bool
    ) -> Float32[Tensor, "b n d"]:
        """Return the tokens of the last transitions of a window, each flattened to one vector."""
        model = self._model.to(frames.device)
        with torch.autocast(frames.device.type, enabled=False):  # a policy's precision is not the LAM's
            actions = model.encode(frames, last=transitions == 1)
        tokens = actions.vectors if quantized else actions.continuous
        return tokens[:, -transitions:].flatten(2).float()
