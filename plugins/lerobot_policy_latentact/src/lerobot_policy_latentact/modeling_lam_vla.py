"""`lam_vla`: a vision-language-action model of latentact behind LeRobot's interface, with the same files.

A folder of `latentact finetune-vla` is a checkpoint of this policy, and a checkpoint of `lerobot-train` is a
folder that `latentact rollout` plays.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

from latentact.policies.vla.model import Vla
from latentact.policies.vla.samples import VlaBatch
from lerobot_policy_latentact.configuration_lam_vla import LamVlaConfig
from lerobot_policy_latentact.modeling_latentact import action_targets, as_uint8

CODES, TOKENS, VALID = "observation.lam_codes", "observation.lam_tokens", "observation.lam_valid"
"""Columns of `latentact precompute`."""


class LamVlaPolicy(PreTrainedPolicy):
    """A vision-language-action model of latentact.

    A discrete action is the environment's integer as float32 ``[b, 1]``.

    Args:
        config: settings; they come from a folder of finetune-vla.
        model: the model; None only for a new policy, which is refused.
        kwargs: LeRobot's statistics and metadata of a dataset, which are not used.
    """

    config_class = LamVlaConfig  # type: ignore[assignment]
    name = "lam_vla"  # type: ignore[assignment]
    config: LamVlaConfig  # type: ignore[assignment]

    def __init__(self, config: LamVlaConfig, model: Vla | None = None, **kwargs: Any) -> None:
        super().__init__(config)
        config.validate_features()
        assert model is not None
        self.model = model
        self.model.latent_weight = config.latent_weight
        self.reset()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_name_or_path: str | Path, *, config: PreTrainedConfig | None = None, **kwargs: Any
    ) -> LamVlaPolicy:
        """Load a folder or hub id, in evaluation mode.

        Raises:
            UserError: it is missing, damaged or not of finetune-vla.
        """
        config = config or PreTrainedConfig.from_pretrained(pretrained_name_or_path)
        assert isinstance(config, LamVlaConfig)
        policy = cls(config, Vla.from_pretrained(pretrained_name_or_path))
        return policy.to(config.device or "cpu").eval()

    def reset(self) -> None:
        """Start a new episode: clear the pending actions."""
        self._pending: deque[Tensor] = deque()

    def get_optim_params(self) -> Any:
        """Return the parameters that are trained."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Return the loss of the robot actions and, where the batch has them, of the latent actions.

        Args:
            batch: image ``[b, c, h, w]``, state ``[b, s]``, actions ``[b, l(, a)]``, `action_is_pad`, and
                the columns of `precompute`.
        """
        inputs, state = self._observe(batch)
        space = self.model.spec.action_space
        assert space is not None
        actions = action_targets(space, batch[ACTION])
        mask = torch.ones(actions.shape[:2], dtype=torch.bool, device=actions.device)
        if "action_is_pad" in batch:
            mask = ~batch["action_is_pad"]
        latent, latent_mask = self._latent(batch, len(actions), actions.device)
        whole = VlaBatch(
            inputs=inputs,
            latent=latent,
            latent_mask=latent_mask,
            state=state,
            actions=actions[..., 0] if space.discrete else actions,
            action_mask=mask,
        )
        loss, metrics = self.model.loss(whole)
        return loss, {name: float(value) for name, value in metrics.items()}

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], **kwargs: Any) -> Tensor:
        """Return the next action, float32 ``[b, a]``; a new chunk is predicted when none is pending."""
        if not self._pending:
            assert self.model.head is not None
            chunk = self.predict_action_chunk(batch)
            self._pending.extend(chunk[:, : self.model.head.n_action_steps].unbind(1))
        return self._pending.popleft()

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Any], **kwargs: Any) -> Tensor:
        """Return the next actions, float32 ``[b, l, a]``.

        Raises:
            UserError: an action is not finite.
        """
        self.eval()
        actions, space = self.model.actions(*self._observe(batch)), self.model.spec.action_space
        assert space is not None
        if space.discrete:
            values = torch.tensor(space.values or range(space.size), device=actions.device)
            actions = values[actions][..., None]
        return actions.float()

    def _observe(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return the prompt and the state of a batch, on the policy's device."""
        device = self.model.own.latent_head.weight.device
        frames = as_uint8(batch[next(iter(self.config.image_features))]).cpu()
        tasks = batch.get("task") or [""] * len(frames)
        tasks = [tasks] * len(frames) if isinstance(tasks, str) else [*tasks]
        inputs = {name: value.to(device) for name, value in self.model.ask(frames, tasks).items()}
        return inputs, batch[OBS_STATE].float().to(device) if self.model.config.use_state else None

    def _latent(self, batch: dict[str, Any], size: int, device: Any) -> tuple[Tensor, Tensor]:
        """Return the latent actions of a batch and which exist; none where the dataset has no such column."""
        latent = self.model.latent
        codes = latent.codebook_size is not None
        shape = (size, latent.tokens) if codes else (size, latent.tokens, latent.token_dim)
        column = batch.get(CODES if codes else TOKENS)
        if column is None:
            dtype = torch.long if codes else torch.float32
            none = torch.zeros(size, dtype=torch.bool, device=device)
            return torch.zeros(shape, dtype=dtype, device=device), none
        valid = batch.get(VALID, torch.ones(size, device=device)).reshape(size).bool()
        return (column.long() if codes else column.float()).reshape(shape), valid

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the files of a folder of finetune-vla."""
        self.model.write(save_directory)
        self.config._save_pretrained(save_directory)
