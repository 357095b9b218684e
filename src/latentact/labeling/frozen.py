"""The frozen latent action model of a policy: not trained, and not part of the policy's modules."""

from __future__ import annotations

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from latentact.lams.contract import load_lam


class FrozenLam:
    """A loaded LAM for windows of frames; not an `nn.Module`, so that its owner's checkpoints exclude it.

    Args:
        where: folder or hub id.

    Raises:
        UserError: the LAM cannot be loaded.
    """

    def __init__(self, where: str) -> None:
        self._model = load_lam(where).requires_grad_(False)
        self.spec = self._model.spec
        self.state_size = self._model.state_size

    def offsets(self, transitions: int, gap: int) -> list[int]:
        """Return the offsets, from the current frame, of the last transitions and their context."""
        return [step * gap for step in range(-transitions - self._model.context, 1)]

    @torch.no_grad()
    def tokens(
        self,
        frames: UInt8[Tensor, "b t c h w"],
        transitions: int,
        quantized: bool,
        states: Float32[Tensor, "b t s"] | None = None,
    ) -> Float32[Tensor, "b n d"]:
        """Return the tokens of the last transitions of a window, each flattened to one vector.

        Args:
            frames: a window of frames at `offsets`.
            transitions: n, the number of transitions.
            quantized: whether tokens are taken after the quantizer or before it.
            states: robot states of the frames, for a LAM that uses them.

        Raises:
            UserError: the LAM uses states, and they are missing or have a different size.
        """
        model = self._model.to(frames.device)
        with torch.autocast(frames.device.type, enabled=False):  # fp32 also under a policy's autocast
            actions = model.encode(frames, last=transitions == 1, states=states)
        tokens = actions.vectors if quantized else actions.continuous
        return tokens[:, -transitions:].flatten(2).float()
