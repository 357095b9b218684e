"""Vision-language-action model: from an image and a task text to latent actions and robot actions.

The vision-language model keeps its vocabulary. Our modules are added around it, as in LAPA (arXiv
2410.11758): an embedding and a head for the codes of latent actions, and queries whose hidden states an
action head reads. Their embeddings are appended to the prompt; codes are decoded autoregressively, restricted
to the codebook, and everything else in one pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor, nn

from latentact.config import Between, OneOf, check_bounds, from_dict, to_dict
from latentact.errors import UserError, require_one_of
from latentact.io.atomic import atomic_dir, read_json, write_json
from latentact.io.hub import resolve_folder
from latentact.io.records import naming
from latentact.io.specs import load_spec
from latentact.io.tensors import WEIGHTS, load_tensors, load_weights, save_tensors
from latentact.policies.lerobot_files import VLA_TYPE, config_entries, processor_files
from latentact.policies.selection import Choose, greedy
from latentact.policies.vla.backbone import (
    add_lora,
    append,
    checkpoint_activations,
    context_length,
    load_vlm,
    merge_lora,
    no_progress_bar,
    prepare_inputs,
    unused_parameters,
    vision_parameters,
)
from latentact.policies.vla.heads import HEADS, ActionHeadConfig
from latentact.policies.vla.samples import VlaBatch
from latentact.types import ActionSpace, LatentActionSpec

BACKBONE = "vlm"
"""Folder of the vision-language model in a checkpoint; transformers can load it by itself."""


@dataclass(frozen=True, kw_only=True)
class VlaConfig:
    """Settings of a vision-language-action model."""

    vlm: str = "Qwen/Qwen3-VL-2B-Instruct"
    """Vision-language model of transformers: a hub id or a folder. tiny: a small one with random weights, for
    tests and small grid worlds."""
    prompt: str = "What action should the robot take to {task}?"
    """Prompt next to the image; {task} is replaced by the task text."""
    use_state: bool = False
    """Whether the model takes the robot state."""
    freeze_vision: bool = True
    """Whether the vision tower is frozen."""
    lora_rank: Annotated[int, Between(0, 4096)] = 0
    """Rank of low-rank adapters on the language model; 0: all its weights are trained."""
    lora_alpha: Annotated[int, Between(1, 1 << 16)] = 16
    """Scale of the adapters."""
    gradient_checkpointing: bool = False
    """Whether to checkpoint activations: less memory, a third more time."""
    regression: Annotated[str, OneOf(("l1", "mse"))] = "l1"
    """Loss for latent actions without codes: l1 or mse, of normalized values."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        check_bounds(self)
        require_one_of("model.regression", self.regression, ("l1", "mse"))
        if not self.vlm:
            raise UserError("model.vlm must be tiny, a folder or a hub id, got an empty name.")


@dataclass(frozen=True, kw_only=True)
class VlaSpec:
    """Inputs and outputs of a model; saved with it."""

    resolution: int
    """Height and width of the images in pixels."""
    state_size: int = 0
    """Dimensions of the robot state; 0 without one."""
    fps: float = 0.0
    """Environment steps per second."""
    camera: str = ""
    """Camera key of the training data."""
    action_space: ActionSpace | None = None
    """Robot action space; None before `finetune-vla`."""


class Heads(nn.Module):
    """Our part of the model: embeddings, heads and statistics.

    Args:
        config: settings of the model.
        spec: inputs and outputs of the model.
        latent: spec of the latent actions.
        width: hidden size of the language model.
        head: settings of the action head; None: latent actions only.
    """

    state_mean: Tensor
    state_std: Tensor
    latent_mean: Tensor
    latent_std: Tensor

    def __init__(
        self,
        config: VlaConfig,
        spec: VlaSpec,
        latent: LatentActionSpec,
        width: int,
        head: ActionHeadConfig | None,
    ) -> None:
        super().__init__()
        codes = latent.codebook_size
        inputs = codes if codes else latent.tokens
        self.latent_embed = nn.Embedding(inputs, width)  # of codes; without codes, of queries
        self.latent_head = nn.Linear(width, codes or latent.token_dim)
        self.state_embed = nn.Linear(spec.state_size, width) if config.use_state else None
        numbers = 0 if codes else latent.token_dim
        for name, shape in (("state", (spec.state_size,)), ("latent", (latent.tokens, numbers))):
            self.register_buffer(f"{name}_mean", torch.zeros(shape))
            self.register_buffer(f"{name}_std", torch.ones(shape))
        self.queries = self.actions = None
        if head:
            assert spec.action_space is not None
            self.queries = nn.Embedding(head.chunk_size, width)
            self.actions = HEADS[head.kind](head, spec.action_space, width)
        for table in (self.latent_embed, self.queries):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)


class Vla(nn.Module):
    """A vision-language model with our heads.

    Args:
        config: settings.
        spec: inputs and outputs of the model.
        latent: spec of the latent actions.
        vlm: the vision-language model.
        processor: its processor.
        head: settings of the action head; None: latent actions only.
        latent_weight: loss weight of latent actions relative to robot actions.
    """

    def __init__(
        self,
        config: VlaConfig,
        spec: VlaSpec,
        latent: LatentActionSpec,
        vlm: Any,
        processor: Any,
        head: ActionHeadConfig | None = None,
        latent_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.config, self.spec, self.latent, self.head = config, spec, latent, head
        self.latent_weight = latent_weight
        self.vlm, self.processor = vlm, processor
        text = vlm.config.get_text_config()
        self.context = context_length(vlm.config)
        self.own = Heads(config, spec, latent, text.hidden_size, head)
        self._filler: int = processor.tokenizer.eos_token_id
        self._tail: Tensor | None = None
        # A bound method, so that a copy of the model has its own hook.
        self._hook = vlm.get_input_embeddings().register_forward_hook(self._insert_tail)
        names = getattr(vlm, "_no_split_modules", None) or ()
        self._no_split_modules = [n for n in names if n.endswith(("Layer", "Block", "Attention"))]
        self._prepare()

    def _prepare(self) -> None:
        """Freeze parameters, add adapters and checkpoint activations as configured."""
        self.vlm.train()  # transformers loads it in evaluation mode, in which it checkpoints nothing
        if self.config.lora_rank:
            self.vlm.requires_grad_(False)
            add_lora(self.vlm, self.config.lora_rank, self.config.lora_alpha)
        frozen = [*unused_parameters(self.vlm)]
        frozen += [*vision_parameters(self.vlm)] if self.config.freeze_vision else []
        for parameter in frozen:
            parameter.requires_grad_(False)
        if self.head and not self.latent_weight:
            self.own.latent_embed.requires_grad_(False)
            self.own.latent_head.requires_grad_(False)
        if self.config.gradient_checkpointing:
            checkpoint_activations(self.vlm)

    @classmethod
    def create(
        cls,
        config: VlaConfig,
        spec: VlaSpec,
        latent: LatentActionSpec,
        head: ActionHeadConfig | None = None,
        latent_weight: float = 1.0,
    ) -> Vla:
        """Return a model around the configured vision-language model; our part has random weights.

        Raises:
            UserError: the vision-language model cannot be read, or is not an image-text-to-text model.
        """
        vlm, processor = load_vlm(config.vlm, spec.resolution)
        return cls(config, spec, latent, vlm, processor, head, latent_weight)

    def with_actions(
        self, config: VlaConfig, actions: ActionSpace, head: ActionHeadConfig, latent_weight: float
    ) -> Vla:
        """Return a model with a new action head that shares this vision-language model."""
        self._hook.remove()
        spec = replace(self.spec, action_space=actions)
        tuned = Vla(config, spec, self.latent, self.vlm, self.processor, head, latent_weight)
        own = {k: v for k, v in self.own.state_dict().items() if not k.startswith(("actions.", "queries."))}
        tuned.own.load_state_dict({**tuned.own.state_dict(), **own})
        return tuned

    def set_stats(self, latent: Shaped[np.ndarray, "n k *d"], state: np.ndarray | None) -> None:
        """Set means and standard deviations of continuous latent actions and of states."""
        own = self.own
        if self.latent.codebook_size is None:
            own.latent_mean.copy_(torch.from_numpy(latent.mean(0)))
            std = torch.from_numpy(latent.std(0))
            own.latent_std.copy_(std.clamp(min=max(1e-4, 1e-2 * std.max().item())))
        if state is not None and self.spec.state_size:
            own.state_mean.copy_(torch.from_numpy(state.mean(0)))
            own.state_std.copy_(torch.from_numpy(state.std(0)).clamp(min=1e-4))

    def prepare_inputs(self, frames: UInt8[Tensor, "b 3 h w"], tasks: list[str]) -> dict[str, Tensor]:
        """Return the inputs of the vision-language model for images and task texts.

        Raises:
            UserError: a prompt is longer than the context.
        """
        size = (self.spec.resolution,) * 2
        if frames.shape[-2:] != size:
            frames = F.interpolate(frames, size, mode="bilinear", antialias=True)
        prompts = [self.config.prompt.replace("{task}", task) for task in tasks]
        return prepare_inputs(self.processor, frames, prompts, self.context)

    def loss(self, batch: VlaBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of latent actions, of robot actions, or their weighted sum; and metrics."""
        total, metrics = torch.zeros((), device=self.own.latent_head.weight.device), {}
        if self.head is None or self.latent_weight:
            latent, metrics = self.latent_loss(batch)
            total = total + (self.latent_weight if self.head else 1.0) * latent
        if self.head is not None:
            assert self.own.actions is not None
            assert batch.actions is not None
            assert batch.action_mask is not None
            hidden = self._action_hidden(batch.inputs, batch.state)
            action = self.own.actions.loss(hidden, batch.actions, batch.action_mask)
            total, metrics = total + action, {**metrics, "action_loss": action.detach()}
        return total, metrics

    def latent_loss(self, batch: VlaBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the cross-entropy of codes given those before, or the error of normalized values."""
        k = self.latent.tokens
        count = batch.latent_mask.sum().clamp(min=1)
        if self.latent.codebook_size is None:
            out = self._latent_numbers(batch.inputs, batch.state)
            error = out - (batch.latent - self.own.latent_mean) / self.own.latent_std
            each = error.abs() if self.config.regression == "l1" else error.square()
            loss = (each.mean((1, 2)) * batch.latent_mask).sum() / count
            return loss, {"latent_loss": loss.detach()}
        logits = self.code_logits(batch.inputs, batch.state, batch.latent[:, :-1])
        each = F.cross_entropy(logits.flatten(0, 1), batch.latent.flatten(), reduction="none").view(-1, k)
        right = (logits.argmax(-1) == batch.latent).float().mean(1)
        loss = (each.mean(1) * batch.latent_mask).sum() / count
        accuracy = (right * batch.latent_mask).sum() / count
        return loss, {"latent_loss": loss.detach(), "code_accuracy": accuracy}

    @torch.no_grad()
    def decode(self, inputs: dict[str, Tensor], state: Tensor | None) -> Shaped[Tensor, "b k *d"]:
        """Return the codes, int64 ``[b, k]``, each the most likely one of the codebook given those before it.

        For latent actions without codes, return their values, float32 ``[b, k, d]``.
        """
        if self.latent.codebook_size is None:
            return self._latent_numbers(inputs, state) * self.own.latent_std + self.own.latent_mean
        codes = torch.zeros(len(inputs["input_ids"]), 0, dtype=torch.long, device=inputs["input_ids"].device)
        for _ in range(self.latent.tokens):
            logits = self.code_logits(inputs, state, codes)
            codes = torch.cat([codes, logits[:, -1:].argmax(-1)], dim=1)
        return codes

    @torch.no_grad()
    def actions(
        self, inputs: dict[str, Tensor], state: Tensor | None, choose: Choose = greedy
    ) -> Shaped[Tensor, "b l *a"]:
        """Return a chunk of robot actions: classes selected by `choose`, or values in the robot's units.

        Raises:
            UserError: the model has no action head, or its outputs are not finite.
        """
        if self.own.actions is None:
            raise UserError(
                "the model must output robot actions, got latent actions. Fine-tune it first: latentact "
                "finetune-vla --help."
            )
        actions = self.own.actions.actions(self._action_hidden(inputs, state), choose)
        if not actions.isfinite().all():
            raise UserError(
                "the actions of the model must be finite, got NaN or infinity. Train it again with a lower "
                "learning rate."
            )
        return actions

    def code_logits(self, inputs: dict[str, Tensor], state: Tensor | None, codes: Tensor) -> Tensor:
        """Return the logits of the codes after 0, 1, ..., n given ones, ``[b, n + 1, codebook]``.

        Args:
            inputs: result of `prepare_inputs`.
            state: robot state ``[b, s]``, or None.
            codes: int64 ``[b, n]``.
        """
        hidden = self._hidden(inputs, state, self.own.latent_embed(codes))
        return self.own.latent_head(hidden).float()

    def _latent_numbers(self, inputs: dict[str, Tensor], state: Tensor | None) -> Float[Tensor, "b k d"]:
        return self.own.latent_head(self._hidden(inputs, state, self.own.latent_embed.weight)[:, 1:]).float()

    def _action_hidden(self, inputs: dict[str, Tensor], state: Tensor | None) -> Float[Tensor, "b l h"]:
        assert self.own.queries is not None
        return self._hidden(inputs, state, self.own.queries.weight)[:, 1:]

    def _hidden(
        self, inputs: dict[str, Tensor], state: Tensor | None, tail: Tensor
    ) -> Float[Tensor, "b n1 h"]:
        """Return the last hidden states of the position before the tail, and of the tail.

        Args:
            inputs: result of `prepare_inputs`.
            state: robot state ``[b, s]`` in its own units; it gets one position before the tail.
            tail: embeddings at the end, ``[b, n, h]`` or, the same for all samples, ``[n, h]``.
        """
        if tail.ndim == 2:
            tail = tail.expand(len(inputs["input_ids"]), -1, -1)
        n = tail.shape[1]
        if self.own.state_embed is not None:
            if state is None or state.shape[1] != self.spec.state_size:
                got = "none" if state is None else state.shape[1]
                raise UserError(f"observation.state must have {self.spec.state_size} values, got {got}.")
            normal = (state - self.own.state_mean) / self.own.state_std
            tail = torch.cat([self.own.state_embed(normal)[:, None].to(tail), tail], dim=1)
        self._tail = tail
        try:
            whole = append(inputs, tail.shape[1], self._filler)
            hidden = self.vlm.model(**whole, use_cache=False).last_hidden_state
        finally:
            self._tail = None
        return hidden[:, hidden.shape[1] - n - 1 :].float()

    def _insert_tail(self, module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
        if self._tail is None or not self._tail.shape[1]:
            return embedded
        return torch.cat([embedded[:, : -self._tail.shape[1]], self._tail.to(embedded.dtype)], dim=1)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a checkpoint folder atomically. Adapters are merged into the weights first."""
        with atomic_dir(Path(folder)) as partial:
            self.write(partial)

    def write(self, folder: Path) -> None:
        """Write the files of a checkpoint into an existing folder, `config.json` last.

        The vision-language model is in `vlm`, in the format of transformers; `model.safetensors` is our part.
        """
        if self.config.lora_rank:
            merge_lora(self.vlm)
            self.config = replace(self.config, lora_rank=0)
        with atomic_dir(folder / BACKBONE) as partial, no_progress_bar():
            self.vlm.save_pretrained(partial)
            self.processor.save_pretrained(partial)
        save_tensors(folder / WEIGHTS, self.own.state_dict())
        self.latent.save(folder / "spec.json")
        values = {"vla": to_dict(self.config), "spec": to_dict(self.spec), "head": to_dict(self.head)}
        write_json(folder / "config.json", values | self._write_lerobot_files(folder))

    def _write_lerobot_files(self, folder: Path) -> dict[str, Any]:
        """Write LeRobot's processor files and return its entries of `config.json`."""
        entries = config_entries(
            camera=self.spec.camera,
            resolution=self.spec.resolution,
            channels=3,
            state_size=self.spec.state_size if self.config.use_state else 0,
            actions=self.spec.action_space,
            n_obs_steps=1,
            latent=self.latent,
        )
        entries = {k: v for k, v in entries.items() if not k.startswith("optimizer_")} | {"type": VLA_TYPE}
        for name, content in processor_files(entries).items():
            write_json(folder / name, content)
        return entries

    @classmethod
    def from_pretrained(cls, where: str | Path, device: str = "cpu") -> Vla:
        """Load a checkpoint of `train-vla` or `finetune-vla`, in evaluation mode; needs no network.

        Raises:
            UserError: the checkpoint is missing, truncated or of another type; nothing in it is executed.
        """
        folder = resolve_folder(where)
        values = read_json(folder / "config.json")
        if not isinstance(values, dict) or not {"vla", "spec", "head"} <= values.keys():
            raise UserError(
                f"{folder} must be a vision-language-action model, got another checkpoint. Give the folder "
                "of a train-vla or finetune-vla run."
            )
        with naming(folder / "config.json"):
            config = from_dict(VlaConfig, values["vla"], "vla")
            spec = from_dict(VlaSpec, values["spec"], "spec")
            head = from_dict(ActionHeadConfig, values["head"], "head") if values["head"] else None
        vlm, processor = load_vlm(str(folder / BACKBONE), spec.resolution)
        model = cls(config, spec, load_spec(folder / "spec.json"), vlm, processor, head)
        load_weights(model.own, load_tensors(folder / WEIGHTS), folder / WEIGHTS)
        return model.eval().to(device)
