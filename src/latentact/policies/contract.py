"""What a policy is (observations in, a chunk of targets out, robot actions in the end); how one is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from latentact.config import from_dict, to_dict
from latentact.data.samples import PolicyBatch
from latentact.errors import UserError, require_between
from latentact.io.atomic import atomic_dir, read_json, write_json
from latentact.io.hub import resolve_folder
from latentact.io.records import naming
from latentact.io.specs import load_spec
from latentact.io.tensors import (
    WEIGHTS,
    load_tensors,
    load_weights,
    require_weights,
    save_tensors,
    settings_of,
)
from latentact.nn.impala import Impala
from latentact.nn.patch import PatchEncoder
from latentact.policies.decoder import ActionDecoder, DecoderConfig
from latentact.policies.network import NetworkConfig
from latentact.registry import Registry
from latentact.types import ActionSpace, LatentActionSpec


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a policy predicts per step: `groups` choices among `size` classes, or `size` numbers."""

    kind: Literal["classes", "numbers"]
    """classes or numbers."""
    size: int
    """Classes per choice, or numbers."""
    groups: int = 1
    """Choices per step."""

    @property
    def outputs(self) -> int:
        """Outputs of the network per step."""
        return self.size * self.groups


@dataclass(frozen=True, kw_only=True)
class GuideSpec:
    """The part of a demonstration's LAM tokens that a guided policy sees at each step."""

    offsets: tuple[int, ...]
    """Steps ahead whose tokens it sees; 0 is the transition that starts now."""
    size: int
    """Numbers of one step's tokens, k x d."""
    tokens: Literal["continuous", "vectors"] = "continuous"
    """continuous: before the quantizer; vectors: after it."""
    dropout: float = 0.0
    """Share of training samples whose guide is hidden, so that the policy also works without one."""


@dataclass(frozen=True, kw_only=True)
class PolicySpec:
    """What a policy was trained for; saved with it."""

    resolution: int
    """Height and width in pixels."""
    channels: int = 3
    """Channels of a frame."""
    state_size: int = 0
    """Numbers of the robot state, 0 where there is none."""
    words: tuple[str, ...] = ()
    """Vocabulary of the task text."""
    target: Target
    """What the network predicts."""
    action_space: ActionSpace | None = None
    """Robot action it ends in; None before grounding."""
    stride: int = 1
    """Environment steps per predicted target."""
    fps: float = 0.0
    """Environment steps per second."""
    camera: str = ""
    """Camera key of the training data."""
    guide: GuideSpec | None = None
    """How LAM tokens of a demonstration guide it; None where nothing does."""

    def __post_init__(self) -> None:
        """Validate the numbers."""
        require_between("spec.resolution", self.resolution, 1, 1 << 14)
        require_between("spec.state_size", self.state_size, 0, 1 << 20)
        require_between("spec.stride", self.stride, 1, 1 << 14)
        require_between("spec.fps", self.fps, 0, 1e6)


@runtime_checkable
class PolicyConfig(Protocol):
    """Settings of a policy; a frozen dataclass with these two fields."""

    @property
    def kind(self) -> str:
        """Registered name."""
        ...

    @property
    def network(self) -> NetworkConfig:
        """The network."""
        ...


POLICIES: Registry[type[PolicyConfig]] = Registry("policy", "latentact.policies")


class Policy(nn.Module):
    """A network from observations to a chunk of targets; behind latent ones, once grounded, a decoder.

    Args:
        config: which policy.
        spec: what for.
        latent: what its latent actions mean, where its targets are latent actions.
        decoder: settings of the decoder from latent to robot actions; None while not grounded.
    """

    mean: Tensor
    std: Tensor
    state_mean: Tensor
    state_std: Tensor
    guide_mean: Tensor
    guide_std: Tensor

    def __init__(
        self,
        config: PolicyConfig,
        spec: PolicySpec,
        latent: LatentActionSpec | None = None,
        decoder: DecoderConfig | None = None,
    ) -> None:
        super().__init__()
        self.config, self.spec, self.latent = config, spec, latent
        n = config.network
        channels = spec.channels * n.n_obs_steps
        if n.backbone == "impala":
            self.encoder = Impala(channels, spec.resolution, tuple(n.impala_scale * c for c in (16, 32, 32)))
        else:
            self.encoder = PatchEncoder(channels, spec.resolution, n.patch, n.channels, halve=n.halve)
        state = spec.state_size if n.use_state else 0
        self.extra = nn.Linear(state + len(spec.words), 256) if state + len(spec.words) else None
        self.head = nn.Linear(256, n.chunk_size * spec.target.outputs)
        numbers = spec.target.size if spec.target.kind == "numbers" else 0
        self.register_buffer("mean", torch.zeros(numbers))
        self.register_buffer("std", torch.ones(numbers))
        self.register_buffer("state_mean", torch.zeros(spec.state_size))
        self.register_buffer("state_std", torch.ones(spec.state_size))
        self.decoder = self._build_decoder(decoder) if decoder else None
        size = spec.guide.size if spec.guide else 0
        self.register_buffer("guide_mean", torch.zeros(size))
        self.register_buffer("guide_std", torch.ones(size))
        self.guide = None
        if spec.guide:
            tokens = size * len(spec.guide.offsets)
            self.guide = nn.Sequential(
                nn.Linear(256 + tokens + 1, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()
            )

    @property
    def uses_state(self) -> bool:
        """Whether the network or the decoder takes the robot state."""
        return self.config.network.use_state or (self.decoder is not None and self.decoder.config.use_state)

    def _build_decoder(self, config: DecoderConfig) -> ActionDecoder:
        assert self.spec.action_space is not None
        state = self.spec.state_size if config.use_state else 0
        return ActionDecoder(
            config, self.spec.target.outputs, state, self.spec.action_space, self.spec.stride
        )

    def ground(self, config: DecoderConfig, actions: ActionSpace) -> Policy:
        """Return this policy with a new decoder to robot actions behind it; the network is shared."""
        from dataclasses import replace

        grounded = Policy(self.config, replace(self.spec, action_space=actions), self.latent, config)
        own = self.state_dict()
        load = grounded.state_dict() | {k: v for k, v in own.items() if not k.startswith("decoder.")}
        grounded.load_state_dict(load)
        return grounded

    def set_action_stats(
        self, target: np.ndarray, state: np.ndarray | None, guide: np.ndarray | None = None
    ) -> None:
        """Take means and deviations from training data, ``[n, f]`` each: targets, states, guiding tokens."""
        if self.spec.target.kind == "numbers":
            self.mean.copy_(torch.from_numpy(target.mean(0)))
            std = torch.from_numpy(target.std(0))
            # Latent numbers share a unit: one that hardly varies is not blown up to the size of the others.
            self.std.copy_(std.clamp(min=max(1e-4, 1e-2 * std.max().item() if self.latent else 0.0)))
        if state is not None:
            self.state_mean.copy_(torch.from_numpy(state.mean(0)))
            self.state_std.copy_(torch.from_numpy(state.std(0)).clamp(min=1e-4))
        if guide is not None:
            self.guide_mean.copy_(torch.from_numpy(guide.mean(0)))
            self.guide_std.copy_(torch.from_numpy(guide.std(0)).clamp(min=1e-4))

    def forward(
        self, frames: Tensor, state: Tensor | None, words: Tensor, guide: Tensor | None = None
    ) -> Float[Tensor, "b l f"]:
        """Return network outputs: normalized numbers, or logits of all classes of all groups."""
        features = self.features(frames, state, words)
        if self.guide is not None:
            features = self.guide(torch.cat([features, self._seen_guide(guide, features)], dim=1))
        return self.head(features).unflatten(1, (self.config.network.chunk_size, -1)).float()

    def _seen_guide(self, guide: Tensor | None, features: Tensor) -> Float[Tensor, "b g"]:
        """Normalized tokens and a 1 where there is a guide, zeros where there is none or it is dropped."""
        assert self.spec.guide is not None
        if guide is None:
            return features.new_zeros(len(features), self.spec.guide.size * len(self.spec.guide.offsets) + 1)
        there = guide.isfinite().flatten(1).all(1)
        if self.training and self.spec.guide.dropout:
            there = there & (torch.rand(len(guide), device=guide.device) >= self.spec.guide.dropout)
        tokens = ((guide.nan_to_num() - self.guide_mean) / self.guide_std).flatten(1)
        return torch.cat([tokens, torch.ones_like(tokens[:, :1])], dim=1) * there[:, None]

    def features(self, frames: Tensor, state: Tensor | None, words: Tensor) -> Float[Tensor, "b 256"]:
        """Return what the network makes of an observation, before its last layer."""
        x = frames
        if x.shape[-2:] != (self.spec.resolution,) * 2:
            size = (self.spec.resolution,) * 2
            x = F.interpolate(x.flatten(0, 1).float(), size, mode="bilinear", antialias=True).unflatten(
                0, x.shape[:2]
            )
        x = torch.cat(x.unbind(1), dim=1).float().div(255).sub(0.5)
        features = self.encoder(x)
        if self.extra is not None:
            parts = [self.normal_state(state)] if self.config.network.use_state else []
            features = features + self.extra(torch.cat([*parts, words], dim=1))
        return features

    def normal_state(self, state: Tensor | None) -> Tensor:
        """Return the state at zero mean and unit variance."""
        if state is None or state.shape[1] != self.spec.state_size:
            got = "none" if state is None else f"{state.shape[1]} numbers"
            raise UserError(
                f"the policy wants a robot state of {self.spec.state_size} numbers and got {got}."
            )
        return (state - self.state_mean) / self.state_std

    def loss(self, batch: PolicyBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy for classes, squared error of normalized numbers; masked targets count nothing."""
        out = self(batch.frames, batch.state, batch.words, batch.guide)
        if self.spec.target.kind == "classes":
            logits = out.unflatten(2, (self.spec.target.groups, self.spec.target.size))
            target = batch.target.masked_fill(~batch.mask[..., None], 0)
            each = F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="none").view(
                target.shape
            )
        else:
            target = (batch.target.nan_to_num() - self.mean) / self.std
            each = (out - target).square()
        loss = (each.mean(2) * batch.mask).sum() / batch.mask.sum().clamp(min=1)
        return loss, {}

    def decoder_input(self, out: Float[Tensor, "b l f"]) -> Float[Tensor, "b l f"]:
        """Return what the decoder takes: normalized vectors, or the probability of every class."""
        if self.spec.target.kind == "numbers":
            return out
        logits = out.unflatten(-1, (self.spec.target.groups, self.spec.target.size))
        return logits.softmax(-1).flatten(-2)

    def action_scores(self, batch: PolicyBatch) -> Float[Tensor, "b l a"]:
        """Return logits of discrete actions or normalized continuous ones, a row per environment step."""
        out = self(batch.frames, batch.state, batch.words, batch.guide)
        if self.decoder is None:
            return out
        state = self.normal_state(batch.state) if self.decoder.config.use_state else None
        return self.decoder(self.decoder_input(out), state)

    @torch.no_grad()
    def actions(self, batch: PolicyBatch) -> np.ndarray:
        """Return robot actions: classes, int64 ``[b, l]``, or float32 ``[b, l, a]``.

        Raises:
            UserError: it is not grounded, or its outputs are not finite.
        """
        space = self.spec.action_space
        if space is None:
            raise UserError("this policy predicts latent actions; ground it first: latentact ground --help.")
        scores = self.action_scores(batch)
        if not scores.isfinite().all():
            raise UserError(
                "the actions of the policy must be finite, got NaN or infinity. Train it again, with a "
                "smaller learning rate."
            )
        if space.discrete:
            return scores.argmax(-1).numpy(force=True)
        if self.decoder is not None:
            return self.decoder.unnormalize(scores).float().numpy(force=True)
        return (scores * self.std + self.mean).float().numpy(force=True)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json`, `model.safetensors` and where it has one `spec.json`, whole or not at all."""
        with atomic_dir(Path(folder)) as partial:
            self.write(partial)

    def write(self, folder: Path) -> None:
        """Write the checkpoint's files into an existing folder."""
        save_tensors(folder / WEIGHTS, self.state_dict())
        if self.latent:
            self.latent.save(folder / "spec.json")
        decoder = to_dict(self.decoder.config) if self.decoder else None
        values = {"policy": to_dict(self.config), "spec": to_dict(self.spec), "decoder": decoder}
        write_json(folder / "config.json", values)

    def push_to_hub(self, repo_id: str, private: bool | None = None) -> str:
        """Upload the checkpoint to the Hugging Face hub and return its address."""
        from latentact.io.hub import push_folder

        return push_folder(self.write, repo_id, private)

    @classmethod
    def from_pretrained(cls, where: str | Path, device: str = "cpu") -> Policy:
        """Load a policy from a folder or a hub id, in evaluation mode.

        Raises:
            UserError: it is missing, truncated or not a policy; nothing in it is executed.
        """
        folder = resolve_folder(where)
        values = read_json(folder / "config.json")
        known = isinstance(values, dict) and {"policy", "spec", "decoder"} <= values.keys()
        if not known or not isinstance(values["policy"], dict):
            raise UserError(f"{folder} is not a policy; give the folder of a train-policy or ground run.")
        with naming(folder / "config.json"):
            config = from_dict(POLICIES.get(str(values["policy"].get("kind"))), values["policy"], "policy")
            decoder = from_dict(DecoderConfig, values["decoder"], "decoder") if values["decoder"] else None
            spec = from_dict(PolicySpec, values["spec"], "spec")
            if decoder and spec.action_space is None:
                raise UserError(
                    "spec.action_space must be given beside a decoder, got none; ground it again."
                )
        latent = load_spec(folder / "spec.json") if (folder / "spec.json").exists() else None
        tensors = load_tensors(folder / WEIGHTS)
        with settings_of(folder):
            with torch.device("meta"):  # sizes that the file does not hold are refused before memory is taken
                require_weights(cls(config, spec, latent, decoder), tensors, folder / WEIGHTS)
            policy = cls(config, spec, latent, decoder)
        load_weights(policy, tensors, folder / WEIGHTS)
        return policy.eval().to(device)
