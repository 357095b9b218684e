"""A policy at work: what it has seen of each environment, and the chunk of actions that it is executing."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from latentact.agents.agent import _state, action_values, picture
from latentact.data.samples import PolicyBatch, count_words
from latentact.policies.contract import GuideSpec, Policy
from latentact.types import ActionSpace


class PolicyActor:
    """Runs a policy in environments: keeps the observed frames and the chunk being executed of each of them.

    Args:
        policy: a grounded policy.
        device: where to run it.
        autocast: whether to run it in bf16.
    """

    def __init__(self, policy: Policy, device: str = "cpu", autocast: bool = False) -> None:
        self.policy = policy.eval().to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.device, self.autocast = device, autocast
        self.reset(0)

    def reset(self, num_envs: int) -> None:
        """Forget everything; the next call to `act` sees first observations."""
        self.history: list[np.ndarray] = []
        self.plan: Any = None
        self.used = 0

    def act(
        self,
        pixels: np.ndarray,
        state: np.ndarray | None,
        tasks: list[str],
        guide: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return one robot action per environment: float32 `[b, a]`, or int64 `[b]` by `ActionSpace.values`.

        A guided policy takes `guide`, float32 ``[b, len(offsets), k * d]``; NaN or None: no guide.
        """
        spec, network = self.policy.spec, self.policy.config.network
        keep = (network.n_obs_steps - 1) * spec.stride + 1
        self.history = [*(self.history or [pixels] * keep), pixels][-keep:]
        if self.plan is None or self.used == network.n_action_steps * spec.stride:
            frames = torch.from_numpy(np.stack(self.history[:: spec.stride], 1)).permute(0, 1, 4, 2, 3)
            words = np.asarray([count_words(t, spec.words) for t in tasks], np.float32).reshape(
                len(tasks), -1
            )
            none = torch.zeros(len(tasks), 0)
            batch = PolicyBatch(
                frames=frames,
                state=None if state is None else torch.from_numpy(state),
                words=torch.from_numpy(words) if spec.words else none,
                target=none[..., None],
                mask=none.bool(),
                guide=None if guide is None else torch.from_numpy(guide),
            ).to(self.device)
            with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
                actions = self.policy.actions(batch)
            self.plan, self.used = action_values(spec.action_space, actions), 0
        self.used += 1
        return self.plan[:, self.used - 1]


class GuidedPolicyAdapter:
    """A policy of `policy=guided`.

    Args:
        policy: the policy.
        guide: what of the guide it sees.
        device: where it is.
    """

    lam_weights = ""
    stride = 1

    def __init__(self, policy: Policy, guide: GuideSpec, device: str) -> None:
        assert policy.spec.action_space is not None
        self._actor = PolicyActor(policy, device)
        self.latent = policy.latent
        self.gap_s = policy.latent.frame_gap_s if policy.latent else 0.0
        self.tokens, self.offsets, self.token_size = guide.tokens, guide.offsets, guide.size
        self.without_guide = guide.dropout > 0
        self.fps, self.cameras = policy.spec.fps, (policy.spec.camera,)
        self.state_size = policy.spec.state_size if policy.config.network.use_state else 0
        self.actions: ActionSpace = policy.spec.action_space

    def reset(self) -> None:
        """Forget the frames that were seen."""
        self._actor.reset(1)

    def prepare(
        self, observation: dict[str, Any], latent_action: Float32[Tensor, "o f"] | None
    ) -> dict[str, Any]:
        """Return a batch of one for the policy's actor."""
        state = _state(observation, self.state_size)[None] if self.state_size else None
        return {
            "pixels": picture(observation, self.cameras[0])[None],
            "state": state,
            "tasks": [str(observation.get("task", ""))],
            "guide": None if latent_action is None else latent_action[None].numpy(force=True),
        }

    def act(self, batch: dict[str, Any]) -> np.ndarray:
        """Return the action."""
        return np.asarray(self._actor.act(**batch)[0])
