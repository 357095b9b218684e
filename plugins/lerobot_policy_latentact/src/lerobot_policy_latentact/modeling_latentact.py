"""`latentact`: a latentact policy behind LeRobot's interface, with the same weights, outputs and files.

LeRobot gives images as float32 in [0, 1]; the policy was trained on uint8, and `round(255 * x)` restores it
exactly. The tensors of `model.safetensors` keep latentact's names, so one folder serves both libraries.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

from latentact.data.samples import PolicyBatch, count_words
from latentact.errors import UserError
from latentact.io.tensors import WEIGHTS, load_tensors, load_weights, save_tensors
from latentact.types import ActionSpace
from lerobot_policy_latentact.configuration_lam import LAM_VALID
from lerobot_policy_latentact.configuration_latentact import LatentactConfig

LAM_TOKENS = "observation.lam_tokens"
"""Batch key of the guide's tokens: a dataset column in training, ``[b, offsets * k * d]`` at inference."""
MODEL = "model."
"""Prefix of the names of the policy's tensors in this module."""


def as_uint8(frames: Tensor) -> Tensor:
    """Return LeRobot's images, float32 in [0, 1], as uint8."""
    return frames.mul(255).round().clamp(0, 255).to(torch.uint8) if frames.is_floating_point() else frames


def action_targets(space: ActionSpace, actions: Tensor) -> Tensor:
    """Return dataset actions as float32 ``[b, l, a]``, or as classes, int64 ``[b, l, 1]``.

    Raises:
        UserError: a discrete action is not in the action space.
    """
    actions = actions.reshape(*actions.shape[:2], -1)
    if not space.discrete:
        return actions.float()
    values = torch.tensor(space.values or range(space.size), device=actions.device)
    equal = actions.round().long() == values
    if not equal.any(-1).all():
        raise UserError(
            f"action must be one of {values.tolist()}, got another value. Choose a dataset of the "
            "environment that the policy was trained for."
        )
    return equal.long().argmax(-1, keepdim=True)


class LatentactPolicy(PreTrainedPolicy):
    """A behavior cloning, grounded latent or guided policy of latentact.

    A discrete action is the environment's integer as float32 ``[b, 1]``.

    Args:
        config: settings from a policy folder.
        kwargs: LeRobot's dataset statistics and metadata, which are ignored.
    """

    config_class = LatentactConfig  # type: ignore[assignment]
    name = "latentact"  # type: ignore[assignment]
    config: LatentactConfig  # type: ignore[assignment]

    def __init__(self, config: LatentactConfig, **kwargs: Any) -> None:
        super().__init__(config)
        # Weights stay contiguous: LeRobot cannot save an optimizer's state that is channels last.
        self.model: Any = config.build()
        self.reset()

    def reset(self) -> None:
        """Start a new episode: clear the observed frames and the pending actions."""
        self._frames: deque[Tensor] = deque(maxlen=-self.config.frame_indices[0] + 1)
        self._pending: deque[Tensor] = deque()

    def get_optim_params(self) -> Any:
        """Return the parameters."""
        return self.parameters()

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Return the loss of the robot actions, as in `train-policy` (bc, guided) and `ground` (latent).

        Args:
            batch: frames ``[b, rows, c, h, w]``, state ``[b, rows, s]`` and tokens ``[b, rows, k * d]`` of
                the config's `observation_delta_indices`, actions ``[b, l(, a)]`` and `action_is_pad`.
        """
        rows = self.config.observation_delta_indices
        now = rows.index(0)
        frames = batch[self._camera][:, [rows.index(row) for row in self.config.frame_indices]]
        state = batch[OBS_STATE][:, now] if self.model.uses_state else None
        actions = action_targets(self.model.spec.action_space, batch[ACTION])
        mask = torch.ones_like(actions[..., 0], dtype=torch.bool)
        if "action_is_pad" in batch:
            mask = ~batch["action_is_pad"]
        inputs = self._inputs(batch, frames, state, self._tokens_around(batch), actions, mask)
        decoder = self.model.decoder
        if decoder is None:
            loss, _ = self.model.loss(inputs)
        else:
            targets = inputs.target[..., 0] if decoder.space.discrete else inputs.target
            loss = decoder.action_loss(self.model.action_scores(inputs), targets, inputs.mask)
        return loss, {}

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], **kwargs: Any) -> Tensor:
        """Return the next action, float32 ``[b, a]``; a new chunk is predicted when none is pending.

        Args:
            batch: the current observation, without a time axis.
            kwargs: ignored.
        """
        frame = as_uint8(batch[self._camera])
        self._frames.extend([frame] * (self._frames.maxlen or 1) if not self._frames else [frame])
        if not self._pending:
            seen = torch.stack([*self._frames][:: self.model.spec.stride], 1)
            chunk = self.predict_action_chunk({**batch, self._camera: seen})
            steps = self.model.config.network.n_action_steps * self.model.spec.stride
            self._pending.extend(chunk[:, :steps].unbind(1))
        return self._pending.popleft()

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Any], **kwargs: Any) -> Tensor:
        """Return the next actions, float32 ``[b, l, a]``.

        Args:
            batch: the current observation; frames ``[b, n_obs_steps, c, h, w]``, or ``[b, c, h, w]``, the
                first frame of an episode.
            kwargs: ignored.

        Raises:
            UserError: a guide is missing, or an action is not finite.
        """
        self.eval()
        frames = batch[self._camera]
        if frames.ndim == 4:
            frames = frames[:, None].expand(-1, len(self.config.frame_indices), -1, -1, -1)
        state = batch[OBS_STATE] if self.model.uses_state else None
        none = torch.zeros(len(frames), 0)
        inputs = self._inputs(batch, frames, state, self._guide(batch, len(frames)), none[..., None], none)
        actions = torch.from_numpy(self.model.actions(inputs))
        space = self.model.spec.action_space
        if space.discrete:
            actions = (torch.tensor(space.values)[actions] if space.values else actions)[..., None]
        return actions.float().to(frames.device)

    @property
    def _camera(self) -> str:
        return next(iter(self.config.image_features))

    def _inputs(
        self,
        batch: dict[str, Any],
        frames: Tensor,
        state: Tensor | None,
        guide: Tensor | None,
        target: Tensor,
        mask: Tensor,
    ) -> PolicyBatch:
        """Return the inputs of the latentact policy, on its device."""
        # Channels last, as latentact's own frames are, so that resizing and convolutions round equally.
        frames = as_uint8(frames).permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
        words = self.model.spec.words
        tasks = batch.get("task") or [""] * len(frames)
        tasks = [tasks] * len(frames) if isinstance(tasks, str) else tasks
        counts = torch.tensor([count_words(task, words) for task in tasks], dtype=torch.float32)
        inputs = PolicyBatch(
            frames=frames,
            state=None if state is None else state.float(),
            words=counts.reshape(len(frames), len(words)),
            target=target,
            mask=mask.bool(),
            guide=guide,
        )
        return inputs.to(next(self.model.parameters()).device)

    def _guide(self, batch: dict[str, Any], size: int) -> Tensor | None:
        """Return the guide's tokens at inference, ``[b, offsets, k * d]``; None without a guide."""
        guide = self.model.spec.guide
        if guide is None:
            return None
        if LAM_TOKENS not in batch:
            return self._without_guide()
        return torch.as_tensor(batch[LAM_TOKENS]).float().reshape(size, len(guide.offsets), guide.size)

    def _tokens_around(self, batch: dict[str, Any]) -> Tensor | None:
        """Return the guide's tokens for training, ``[b, offsets, k * d]``; None without a guide.

        If an episode has no token at an offset, the last valid one before it in the window replaces it, else
        the first one after it, else NaN. Index spaces: `start` is the position in the window of the first row
        that is needed; `places` and `offsets` count from it.
        """
        guide = self.model.spec.guide
        if guide is None:
            return None
        if LAM_TOKENS not in batch:
            return self._without_guide()
        rows = self.config.observation_delta_indices
        start = rows.index(min(0, *guide.offsets))
        offsets = torch.tensor([rows.index(row) - start for row in guide.offsets])
        tokens = batch[LAM_TOKENS].float()[:, start:]
        valid = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        if LAM_VALID in batch:
            valid = batch[LAM_VALID].flatten(1)[:, start:].bool()
        places = torch.arange(tokens.shape[1], device=tokens.device)
        last_valid = torch.where(valid, places, -1).cummax(1).values[:, offsets]
        first_valid = valid.int().argmax(1, keepdim=True)
        chosen = torch.where(last_valid < 0, first_valid, last_valid)[..., None]
        guided = tokens.gather(1, chosen.expand(-1, -1, tokens.shape[2]))
        return guided.masked_fill(~valid.any(1)[:, None, None], torch.nan)

    def _without_guide(self) -> None:
        if not self.model.spec.guide.dropout:
            raise UserError(
                f"the batch must hold {LAM_TOKENS!r}, got none. Give a guide with `latentact imitate`, or "
                "train with policy.dropout above 0 for a policy that also acts without one."
            )

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the files of a policy folder."""
        self.config._save_pretrained(save_directory)
        tensors = self.state_dict() if state_dict is None else state_dict
        save_tensors(save_directory / WEIGHTS, {k.removeprefix(MODEL): v for k, v in tensors.items()})
        if self.model.latent:
            self.model.latent.save(save_directory / "spec.json")

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        """Load the weights of a policy folder; names and shapes must match.

        Raises:
            UserError: names or shapes do not match, or the file is damaged.
        """
        load_weights(model.model, load_tensors(Path(model_file)), Path(model_file))
        return model
