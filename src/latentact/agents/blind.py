"""An agent that ignores observations and draws its actions: a floor that every policy must beat."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float32, Shaped

from latentact.agents.agent import AgentSpec, to_env_actions
from latentact.types import ActionSpace

BLIND = ("uniform", "frequencies")


class BlindAgent:
    """Draw actions uniformly, or with their frequencies in demonstrations.

    Args:
        kind: uniform: any class, or values between the minimum and maximum of the demonstrations;
            frequencies: the action of a random step of the demonstrations.
        space: robot action space.
        actions: actions of the demonstrations, int64 ``[n]`` or float32 ``[n, a]``.
        seed: seed of the draws.
    """

    def __init__(
        self,
        kind: str,
        space: ActionSpace,
        actions: Shaped[np.ndarray, "n *a"],
        seed: int,
    ) -> None:
        self.spec = AgentSpec(action_space=space)
        self._kind, self._actions = kind, actions
        self._random = np.random.default_rng(seed)

    def reset(self, num_envs: int) -> None:
        """Do nothing; draws continue."""

    def act(
        self, observation: dict[str, Any], latent: Float32[np.ndarray, "b o f"] | None = None
    ) -> Shaped[np.ndarray, "b *a"]:
        """Return one robot action per episode; see `Agent.act`."""
        return to_env_actions(self.spec.action_space, self._draw(len(next(iter(observation.values())))))

    def _draw(self, count: int) -> Shaped[np.ndarray, "b *a"]:
        space, random = self.spec.action_space, self._random
        if self._kind == "frequencies":
            return self._actions[random.integers(len(self._actions), size=count)]
        if space.discrete:
            return random.integers(space.size, size=count)
        low, high = self._actions.min(0), self._actions.max(0)
        return random.uniform(low, high, (count, space.size)).astype(np.float32)
