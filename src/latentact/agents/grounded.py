"""Grounded latent policies whose decoder alone turns a given latent action into robot actions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from latentact.agents.agent import _state, action_values
from latentact.errors import UserError
from latentact.policies.contract import Policy
from latentact.types import ActionSpace, LatentActionSpec


class GroundedPolicyAdapter:
    """A grounded latent policy that is told its latent action: only its decoder is used.

    Args:
        policy: grounded, with a decoder.
        device: where it is.
    """

    lam_weights = ""
    offsets: tuple[int, ...] = (0,)
    cameras: tuple[str, ...] = ()
    without_guide = False

    def __init__(self, policy: Policy, device: str) -> None:
        assert policy.decoder is not None
        assert policy.latent is not None
        assert policy.spec.action_space is not None
        self._policy, self._decoder, self._device = policy, policy.decoder, device
        self.latent: LatentActionSpec | None = policy.latent
        self.gap_s = policy.latent.frame_gap_s
        self.token_size = policy.latent.tokens * policy.latent.token_dim
        self.tokens = str(getattr(policy.config, "target", "continuous"))
        self.stride, self.fps = policy.spec.stride, policy.spec.fps
        self.state_size = policy.spec.state_size if self._decoder.config.use_state else 0
        self.actions: ActionSpace = policy.spec.action_space
        self.reset()

    def reset(self) -> None:
        """Forget the actions still to be taken."""
        self._plan: list[np.ndarray] = []

    def prepare(
        self, observation: dict[str, Any], latent_action: Float32[Tensor, "o f"] | None
    ) -> dict[str, Any]:
        """Return the decoder's input: normalized numbers or one-hot codes, and the state where it sees it."""
        assert latent_action is not None
        latent, target = latent_action.to(self._device), self._policy.spec.target
        if target.kind == "classes":
            latent = torch.nn.functional.one_hot(latent.long(), target.size).flatten(1).float()
        else:
            latent = (latent - self._policy.mean) / self._policy.std
        state = None
        if self.state_size:
            state = torch.from_numpy(_state(observation, self.state_size))[None].to(self._device)
        return {"latent": latent[:, None], "state": state}

    @torch.inference_mode()
    def act(self, batch: dict[str, Any]) -> np.ndarray:
        """Return the next action of the latent action that was given when none was left."""
        if not self._plan:
            state = None if batch["state"] is None else self._policy.normal_state(batch["state"])
            scores = self._decoder(batch["latent"], state)[0]
            if not scores.isfinite().all():
                raise UserError(
                    "the actions of the policy must be finite, got NaN or infinity. Train it again, with a "
                    "smaller learning rate."
                )
            chosen = scores.argmax(-1) if self.actions.discrete else self._decoder.unnormalize(scores)
            self._plan = [*action_values(self.actions, chosen.numpy(force=True))]
        return np.asarray(self._plan.pop(0))
