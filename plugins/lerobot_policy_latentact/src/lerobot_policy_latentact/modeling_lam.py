"""`lam_diffusion` and `lam_act`: LeRobot's policies with projected LAM tokens as their environment state.

No code of the hosts is copied. The projection is a submodule of the host's network, so that it is optimized,
saved and moved with it; the LAM is not, so that checkpoints do not contain it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
from lerobot.utils.constants import OBS_ENV_STATE, OBS_STATE
from torch import Tensor

from latentact.errors import UserError
from latentact.nn.token_projection import TokenProjection
from lerobot_policy_latentact.configuration_lam import (
    LAM_FRAMES,
    LAM_STATES,
    LAM_VALID,
    LamActConfig,
    LamDiffusionConfig,
    LamPolicyConfig,
)

Host: Any = object
"""Placeholder for the host, the next base class of a policy."""


class LamPolicy(Host):
    """Methods that both policies add to the host.

    While acting, tokens come from the batch (a guide), else on the fly from the frames seen since `reset`,
    else the learned "no guide" condition replaces them (policies trained with `lam_dropout`).
    """

    config: Any
    inside: str
    """Name of the host's network."""

    def __init__(
        self,
        config: LamPolicyConfig,
        *,
        dataset_stats: dict[str, dict[str, Any]] | None = None,
        dataset_meta: Any = None,
        **kwargs: Any,
    ) -> None:
        """Build the host, then attach the projection.

        Raises:
            UserError: dataset, LAM and settings are incompatible.
        """
        if config.use_lam_conditioning and dataset_meta is not None:
            config.check_dataset(dataset_meta)
        super().__init__(config, **kwargs)  # type: ignore[arg-type]
        if not config.use_lam_conditioning:
            return
        if config.lam_on_the_fly:
            self._lam_offsets = config.lam_delta_indices
        self._host.lam_encoder = TokenProjection(
            steps=config.lam_transitions,
            token_dim=config.token_dim,
            width=config.lam_projection_dim,
            dropout=config.lam_dropout,
            stats=(dataset_stats or {}).get(config.lam_tokens_key),
        )

    @property
    def _host(self) -> Any:
        return getattr(self, self.inside)

    def reset(self) -> None:
        """Clear the history of observations."""
        super().reset()
        self._seen: dict[str, deque[Tensor]] = {}

    def forward(self, batch: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Return the host's loss of a batch."""
        if self.config.use_lam_conditioning:
            batch = self._with_lam(batch, learning=True)
        return super().forward(batch, *args, **kwargs)

    def select_action(self, batch: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Return the action for the current observation, and add the observation to the history."""
        if self.config.use_lam_conditioning:
            self._remember(batch)
        return super().select_action(batch, *args, **kwargs)

    def predict_action_chunk(self, batch: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Return the next actions."""
        if self.config.use_lam_conditioning:
            batch = self._with_lam(batch, learning=False)
        return super().predict_action_chunk(batch, *args, **kwargs)

    def _with_lam(self, batch: dict[str, Tensor], *, learning: bool) -> dict[str, Tensor]:
        """Return the batch for the host, with the projection first in the environment state."""
        projected = self._projected(batch, learning=learning)
        batch = self._host_rows(batch)
        return {**batch, OBS_ENV_STATE: self._env_state(batch, projected, learning=learning)}

    def _env_state(self, batch: dict[str, Tensor], projected: Tensor, *, learning: bool) -> Tensor:
        real = [batch[OBS_ENV_STATE]] if self.config.real_env_state_feature else []
        return torch.cat([projected, *real], dim=-1)

    def _host_rows(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a batch without the rows of the window that only the LAM needs."""
        config = self.config
        if LAM_FRAMES not in batch or batch[LAM_FRAMES].ndim == 4:
            return batch
        window = config.observation_delta_indices
        rows = [window.index(row) for row in config.host_delta_indices or [0]]
        own = {key: batch[key][:, rows] for key in config.input_features if key in batch}
        if config.host_delta_indices is None:
            own = {key: value[:, -1] for key, value in own.items()}
        return {**batch, **own}

    def _window(
        self, batch: dict[str, Tensor], key: str, offsets: Sequence[int], rank: int, *, learning: bool
    ) -> Tensor:
        """Return the rows of `key` at `offsets` from the current one, ``[b, n, ...]``.

        Rows before the first observation repeat the oldest.
        """
        if key in self._seen and not learning:
            seen = self._seen[key]
            return torch.stack([seen[max(0, len(seen) - 1 + offset)] for offset in offsets], dim=1)
        value = batch[key]
        if value.ndim == rank:
            return value[:, None].expand(-1, len(offsets), *(-1,) * (rank - 1))
        rows = self.config.observation_delta_indices
        return value[:, [rows.index(offset) for offset in offsets]]

    def _remember(self, batch: dict[str, Tensor]) -> None:
        frames = 1 - self._lam_offsets[0] if self.config.lam_on_the_fly else 0
        kept = {
            self.config.lam_tokens_key: self.config.lam_transitions,
            LAM_FRAMES: frames,
            LAM_STATES: frames,
        }
        for key, length in kept.items():
            if key in batch and length:
                self._seen.setdefault(key, deque(maxlen=length)).append(batch[key])
            else:
                self._seen.pop(key, None)

    def _projected(self, batch: dict[str, Tensor], *, learning: bool) -> Tensor:
        """Return the projected tokens of a batch, ``[b, width]``."""
        config, encoder = self.config, self._host.lam_encoder
        steps = range(1 - config.lam_transitions, 1)
        window = partial(self._window, batch, learning=learning)
        if config.lam_tokens_key in batch and (config.use_precomputed_lam_tokens or not learning):
            valid = window(LAM_VALID, steps, 1).bool() if LAM_VALID in batch else None
            return encoder(window(config.lam_tokens_key, steps, 2), valid)
        if config.lam_on_the_fly:
            if LAM_FRAMES not in batch:
                raise UserError(
                    f"the batch must hold {LAM_FRAMES}, got none. Run it through the policy's preprocessor, "
                    f"which adds the frames of {config.lam_camera}."
                )
            frames = window(LAM_FRAMES, self._lam_offsets, 4)
            states = window(LAM_STATES, self._lam_offsets, 2) if LAM_STATES in batch else None
            return encoder(
                config.lam.tokens(frames, config.lam_transitions, config.lam_use_vq_tokens, states)
            )
        if learning or not config.lam_dropout:
            raise UserError(
                f"the batch must hold {config.lam_tokens_key!r}, got none. Give a guide with `latentact "
                "imitate`, or train with lam_dropout above 0 for a policy that also works without one."
            )
        some = next(v for k, v in batch.items() if k in config.input_features and isinstance(v, Tensor))
        return encoder.without_guide(len(some))


class LamDiffusionPolicy(LamPolicy, DiffusionPolicy):
    """Diffusion Policy conditioned on LAM tokens."""

    config_class = LamDiffusionConfig  # type: ignore[assignment]
    name = "lam_diffusion"  # type: ignore[assignment]
    inside = "diffusion"

    def _env_state(self, batch: dict[str, Tensor], projected: Tensor, *, learning: bool) -> Tensor:
        """Repeat the projection for every observation step, including those in the host's queues."""
        steps, queues = self.config.n_obs_steps, self._queues
        if learning or not queues or not queues[OBS_STATE]:
            return super()._env_state(batch, projected[:, None].expand(-1, steps, -1), learning=learning)
        real = self.config.real_env_state_feature
        width = real.shape[0] if real else 0
        states = queues[OBS_ENV_STATE] if real else [projected] * steps
        rows = [torch.cat([projected, state[:, state.shape[1] - width :]], dim=-1) for state in states]
        queues[OBS_ENV_STATE] = deque(rows, maxlen=steps)
        return projected  # the host reads its queues only


class LamActPolicy(LamPolicy, ACTPolicy):
    """ACT conditioned on LAM tokens."""

    config_class = LamActConfig  # type: ignore[assignment]
    name = "lam_act"  # type: ignore[assignment]
    inside = "model"
