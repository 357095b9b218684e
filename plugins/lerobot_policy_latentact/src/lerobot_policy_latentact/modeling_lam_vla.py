"""`lam_vla`: a latentact vision-language-action model behind LeRobot's interface, with the same files.

A folder of `latentact train-vla` or `finetune-vla` is a checkpoint of this policy, and a checkpoint of
`lerobot-train` is such a folder. A new model learns the latent actions that `precompute` wrote into the
dataset; with an action head it also learns robot actions.
"""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

from latentact.config import to_dict
from latentact.data.cache import cache_folder
from latentact.data.digest import Memo
from latentact.data.format import Source, open_source
from latentact.data.latents import CODES, VALID, TokensRecord
from latentact.data.latents import TOKENS_KEY as TOKENS
from latentact.errors import UserError
from latentact.io.records import read_record
from latentact.io.tensors import load_weights
from latentact.policies.vla.model import Vla, VlaSpec
from latentact.policies.vla.samples import VlaBatch
from latentact.types import LatentActionSpec
from lerobot_policy_latentact.configuration_lam import PROVENANCE
from lerobot_policy_latentact.configuration_lam_vla import LamVlaConfig
from lerobot_policy_latentact.modeling_latentact import action_targets, as_uint8

_NO_TOKENS = (
    "{} must have the columns of latent actions that `latentact precompute` writes, got none. Add them, or "
    "give policy.path of a model with an action head."
)


class LamVlaPolicy(PreTrainedPolicy):
    """A latentact vision-language-action model.

    A discrete action is the environment's integer as float32 ``[b, 1]``.

    Args:
        config: settings.
        model: the model; None: a new one.
        dataset_meta: LeRobot's metadata of the dataset, which a new model or action head needs.
        kwargs: LeRobot's dataset statistics, which are ignored.

    Raises:
        UserError: the settings or the dataset cannot be used.
    """

    config_class = LamVlaConfig  # type: ignore[assignment]
    name = "lam_vla"  # type: ignore[assignment]
    config: LamVlaConfig  # type: ignore[assignment]

    def __init__(
        self, config: LamVlaConfig, model: Vla | None = None, dataset_meta: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(config)
        config.validate_features()
        data = None if dataset_meta is None else _Dataset(dataset_meta)
        new_head = config.head is not None and (model is None or model.head is None)
        if data is None and (model is None or new_head):
            raise UserError(
                "policy.path must be a folder of latentact finetune-vla, got a new model or action head. "
                "Train it with lerobot-train or latentact first."
            )
        if data is not None and model is not None and data.latent is not None:
            model.latent.check_compatible(data.latent, "the model", data.name)
        if data is not None:
            model = model or data.new_model(config)
            model = data.with_actions(model, config) if new_head else model
        assert model is not None
        self.model = _with_settings(model, config)
        self.model.latent_weight = config.latent_weight
        config.spec, config.latent = to_dict(self.model.spec), asdict(self.model.latent)
        self.reset()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_name_or_path: str | Path, *, config: PreTrainedConfig | None = None, **kwargs: Any
    ) -> LamVlaPolicy:
        """Load a folder or hub id, in evaluation mode.

        Raises:
            UserError: the checkpoint is missing, damaged or of another type.
        """
        config = config or PreTrainedConfig.from_pretrained(pretrained_name_or_path)
        assert isinstance(config, LamVlaConfig)
        policy = cls(config, Vla.from_pretrained(pretrained_name_or_path), kwargs.get("dataset_meta"))
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

        Raises:
            UserError: there is no action head and the batch has no latent actions.
        """
        inputs, state = self._observe(batch)
        latent, exists = self._latent(batch, inputs["input_ids"])
        whole = VlaBatch(inputs=inputs, latent=latent, latent_mask=exists, state=state)
        space = self.model.spec.action_space
        if space is not None:
            actions = action_targets(space, batch[ACTION])
            mask = torch.ones(actions.shape[:2], dtype=torch.bool, device=actions.device)
            whole = replace(
                whole,
                actions=actions[..., 0] if space.discrete else actions,
                action_mask=~batch["action_is_pad"] if "action_is_pad" in batch else mask,
            )
        elif not {CODES, TOKENS} & batch.keys():
            raise UserError(_NO_TOKENS.format("the dataset"))
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
            UserError: there is no action head, or an action is not finite.
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
        inputs = {name: value.to(device) for name, value in self.model.prepare_inputs(frames, tasks).items()}
        return inputs, batch[OBS_STATE].float().to(device) if self.model.config.use_state else None

    def _latent(self, batch: dict[str, Any], like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latent actions of a batch and which exist; None if the dataset has no such column."""
        latent, size, device = self.model.latent, len(like), like.device
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


class _Dataset:
    """Metadata and columns of a LeRobot dataset that a model needs.

    Args:
        meta: LeRobot's metadata.

    Raises:
        UserError: the latent actions of the dataset are invalid.
    """

    def __init__(self, meta: Any) -> None:
        self.name, self.meta, self.root = f"the dataset {meta.repo_id}", meta, Path(meta.root)
        file = self.root / "meta" / PROVENANCE
        about = read_record(TokensRecord, file) if file.exists() else None
        self.latent: LatentActionSpec | None = about.spec.spec() if about else None
        self.camera = about.camera if about else ""
        size = self.latent.codebook_size if self.latent else None
        codes = self.column(CODES) if size else None
        if size and codes is not None and not 0 <= codes.min() <= codes.max() < size:
            raise UserError(
                f"{CODES} of {self.name} must be from 0 to {size - 1}, got {codes.min():g} to "
                f"{codes.max():g}. Precompute them again."
            )

    @cached_property
    def source(self) -> Source:
        """Tables of the dataset."""
        camera = self.camera or next(iter(self.meta.camera_keys), "")
        return open_source(self.root, camera, Memo(cache_folder() / "memo", self.root))

    def column(self, name: str) -> np.ndarray | None:
        """Return the rows of a column ``[n, a]`` without NaN; None if the column does not exist."""
        values = self.source.column(name)
        values = None if values is None else values.reshape(len(values), -1)
        return None if values is None else values[np.isfinite(values).all(1)]

    def new_model(self, config: LamVlaConfig) -> Vla:
        """Return a new model for the latent actions of the dataset, and record its settings in `config`."""
        if self.latent is None:
            raise UserError(_NO_TOKENS.format(self.name))
        if "{task}" not in config.vla.prompt:  # YAML reads unquoted braces as a mapping
            raise UserError(
                f"policy.vla.prompt must contain {{task}}, got {config.vla.prompt!r}. Quote it twice: "
                "--policy.vla.prompt='\"{task}\"'."
            )
        camera = self.camera if self.camera in config.image_features else next(iter(config.image_features))
        state = config.robot_state_feature
        if config.vla.use_state and state is None:
            raise UserError(f"{self.name} must have {OBS_STATE}, got none. Set policy.vla.use_state=false.")
        kept = {camera, OBS_STATE} if config.vla.use_state else {camera}
        config.input_features = {k: v for k, v in (config.input_features or {}).items() if k in kept}
        spec = VlaSpec(
            resolution=config.resolution or self.latent.resolution,
            state_size=state.shape[0] if state else 0,
            fps=float(self.meta.fps),
            camera=camera,
        )
        model = Vla.create(config.vla, spec, self.latent)
        latent, states = self.column(TOKENS), self.column(OBS_STATE) if state else None
        if latent is None:
            raise UserError(_NO_TOKENS.format(self.name))
        exists = self.column(VALID)
        latent = latent if exists is None else latent[exists[:, 0] > 0]
        shape = (-1, self.latent.tokens, self.latent.token_dim)
        model.set_stats(latent.reshape(shape).astype(np.float32), states)
        return model

    def with_actions(self, model: Vla, config: LamVlaConfig) -> Vla:
        """Return the model with a new action head, initialized with the statistics of the dataset."""
        space, actions = self.source.action_space, self.column(ACTION)
        if space is None or actions is None:
            raise UserError(
                f"{self.name} must have robot actions, got none. Give a dataset with robot actions."
            )
        assert config.head is not None
        model = model.with_actions(config.vla, space, config.head, config.latent_weight)
        assert model.own.actions is not None
        model.own.actions.set_stats(actions)
        return model


def _with_settings(model: Vla, config: LamVlaConfig) -> Vla:
    """Return a model with the settings changed for this run, such as `policy.head.n_action_steps`."""
    if (config.vla, config.head) == (model.config, model.head):
        return model
    model._hook.remove()
    model.vlm.requires_grad_(True)
    again = Vla(config.vla, model.spec, model.latent, model.vlm, model.processor, config.head)
    load_weights(again.own, model.own.state_dict(), Path("policy"))
    return again
