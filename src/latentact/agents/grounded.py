"""Grounded latent policies that follow given latent actions: only their decoder is used."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Shaped

from latentact.agents.agent import AgentSpec, LatentInput, select_state, to_env_actions
from latentact.errors import UserError
from latentact.policies.contract import Policy
from latentact.policies.selection import Choose, greedy


class DecoderAgent:
    """Decode each given latent action into robot actions; no image is needed.

    Args:
        policy: a grounded latent policy.
        device: device of the policy.
        choose: selects the class of a discrete action.
    """

    def __init__(self, policy: Policy, device: str = "cpu", choose: Choose = greedy) -> None:
        assert policy.decoder is not None
        assert policy.latent is not None
        assert policy.spec.action_space is not None
        self._policy, self._decoder, self._device = policy.eval(), policy.decoder, device
        self._choose = choose
        self.spec = AgentSpec(
            action_space=policy.spec.action_space,
            state_size=policy.spec.state_size if policy.decoder.config.use_state else 0,
            fps=policy.spec.fps,
            latent=LatentInput(
                size=policy.latent.tokens * policy.latent.token_dim,
                kind=policy.targets.column,
                stride=policy.spec.stride,
                gap_s=policy.latent.frame_gap_s,
                spec=policy.latent,
            ),
        )
        self.reset(0)

    def reset(self, num_envs: int) -> None:
        """Clear the decoded actions that were not executed."""
        self._chunk: Any = None
        self._used = 0

    @torch.inference_mode()
    def act(
        self, observation: dict[str, Any], latent: Float32[np.ndarray, "b o f"] | None = None
    ) -> Shaped[np.ndarray, "b *a"]:
        """Return one robot action per episode; see `Agent.act`.

        A latent action is read when all actions of the previous one were executed.
        """
        if latent is None:
            raise UserError("the agent must have latent actions to decode, got none. Give it a guide.")
        if self._chunk is None or self._used == self._chunk.shape[1]:
            self._chunk, self._used = self._decode(observation, latent[:, 0]), 0
        self._used += 1
        return self._chunk[:, self._used - 1]

    def _decode(
        self, observation: dict[str, Any], latent: Float32[np.ndarray, "b f"]
    ) -> Shaped[np.ndarray, "b stride *a"]:
        tokens = self._policy.normal_latent(torch.from_numpy(latent).to(self._device))
        state = None
        if size := self.spec.state_size:
            raw = torch.from_numpy(select_state(observation, size)).to(self._device)
            state = self._policy.normal_state(raw)
        scores = self._decoder(tokens[:, None], state)
        if not scores.isfinite().all():
            raise UserError(
                "the actions of the policy must be finite, got NaN or infinity. Train it again with a lower "
                "learning rate."
            )
        space = self.spec.action_space
        chosen = self._choose(scores) if space.discrete else self._decoder.unnormalize(scores)
        return to_env_actions(space, chosen.numpy(force=True))
