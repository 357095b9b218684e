"""Vision-language-action models as agents: from an image and the task text to a chunk of robot actions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Shaped

from latentact.agents.agent import TASK, AgentSpec, select_image, select_state, to_env_actions
from latentact.errors import UserError
from latentact.policies.selection import Choose, greedy
from latentact.policies.vla.model import Vla


class VlaAgent:
    """Run a model of `finetune-vla`.

    Args:
        model: the model.
        device: where to run it.
        choose: selects the class of a discrete action.

    Raises:
        UserError: the model predicts latent actions only.
    """

    def __init__(self, model: Vla, device: str = "cpu", choose: Choose = greedy) -> None:
        spec = model.spec
        if spec.action_space is None or model.head is None:
            raise UserError(
                "the model must output robot actions, got latent actions. Fine-tune it first: latentact "
                "finetune-vla --help."
            )
        self.model, self.device, self._steps = model.eval().to(device), device, model.head.n_action_steps
        self._choose = choose
        self.spec = AgentSpec(
            action_space=spec.action_space,
            cameras=(spec.camera,),
            state_size=spec.state_size if model.config.use_state else 0,
            fps=spec.fps,
        )
        self.reset(0)

    def reset(self, num_envs: int) -> None:
        """Clear the actions that were not executed."""
        self._chunk: Any = None
        self._used = 0

    def act(
        self, observation: dict[str, Any], latent: Float32[np.ndarray, "b o f"] | None = None
    ) -> Shaped[np.ndarray, "b *a"]:
        """Return one robot action per episode; see `Agent.act`. Latent actions are ignored."""
        if self._chunk is None or self._used == self._steps:
            self._chunk, self._used = self._predict(observation), 0
        self._used += 1
        return self._chunk[:, self._used - 1]

    def _predict(self, observation: dict[str, Any]) -> Shaped[np.ndarray, "b l *a"]:
        frames = torch.from_numpy(select_image(observation, self.spec.cameras[0])).permute(0, 3, 1, 2)
        state = None
        if size := self.spec.state_size:
            state = torch.from_numpy(select_state(observation, size)).to(self.device)
        inputs = self.model.prepare_inputs(frames, list(observation[TASK]))
        actions = self.model.actions({k: v.to(self.device) for k, v in inputs.items()}, state, self._choose)
        return to_env_actions(self.spec.action_space, actions.numpy(force=True))
