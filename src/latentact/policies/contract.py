"""The contract of policies: from observations to a chunk of targets, and finally to robot actions.

A policy is added by one file with three things: a config registered in `POLICIES`, its training targets
(`targets`), and its module, a `Policy` with `features` and `forward`. Everything else is here: normalization,
loss, actions, grounding and checkpoints. `check_policy` checks a module against this contract.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from latentact.config import from_dict, to_dict
from latentact.data.samples import PolicyBatch
from latentact.errors import UserError
from latentact.io.atomic import atomic_dir, read_json, write_json
from latentact.io.hub import push_folder, resolve_folder
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
from latentact.policies.decoder import ActionDecoder, DecoderConfig
from latentact.policies.lerobot_files import config_entries, processor_files
from latentact.policies.selection import Choose, greedy
from latentact.policies.spec import PolicySpec, Targets
from latentact.registry import Registry
from latentact.types import ActionSpace, LatentActionSpec


@runtime_checkable
class NetworkSettings(Protocol):
    """Settings of the network that every policy has; a policy may add fields."""

    @property
    def n_obs_steps(self) -> int:
        """Observed frames, latest last."""
        ...

    @property
    def chunk_size(self) -> int:
        """Targets predicted at once."""
        ...

    @property
    def n_action_steps(self) -> int:
        """Targets executed before the policy observes again."""
        ...

    @property
    def use_state(self) -> bool:
        """Whether the network takes the robot state."""
        ...

    @property
    def uses_frames(self) -> bool:
        """Whether the network takes frames; True for settings of other packages without this property."""
        return True


@runtime_checkable
class PolicyConfig(Protocol):
    """Settings of a policy: a frozen dataclass."""

    @property
    def kind(self) -> str:
        """Registered name."""
        ...

    @property
    def network(self) -> NetworkSettings:
        """The network."""
        ...

    def targets(self, latent: LatentActionSpec | None, actions: ActionSpace | None) -> Targets:
        """Return what the policy learns from.

        Args:
            latent: spec of the labels' latent actions; None without labels.
            actions: robot action space of the data; None if it has none.

        Raises:
            UserError: the data lacks what the policy learns from.
        """
        ...

    def behavior_cloning(self) -> PolicyConfig:
        """Return the policy with the same network that learns robot actions: the baseline in `compare`."""
        ...

    def build(self, spec: PolicySpec, latent: LatentActionSpec | None = None) -> Policy:
        """Return the module with random weights.

        Args:
            spec: inputs and outputs of the policy.
            latent: spec of the latent actions, if targets or guides are latent actions.
        """
        ...


POLICIES: Registry[type[PolicyConfig]] = Registry("policy", "latentact.policies")


def uses_frames(config: PolicyConfig) -> bool:
    """Return whether a policy takes frames; see `NetworkSettings`."""
    return not isinstance(config.network, NetworkSettings) or config.network.uses_frames


class Policy(nn.Module, ABC):
    """A network from observations to a chunk of targets; a grounded latent policy also has a decoder.

    A subclass implements `features` and `forward`, and overrides `loss` if it has its own loss or sampling
    (as in diffusion). For `ground mode=online` it may also override `forward_with_features`, for speed, and
    `output_layer`.

    Args:
        config: settings.
        spec: inputs and outputs of the policy.
        latent: spec of the latent actions, if targets or guides are latent actions.

    Attributes:
        decoder: decoder from latent to robot actions; None for policies that predict robot actions, and
            before grounding.
    """

    mean: Tensor
    std: Tensor
    state_mean: Tensor
    state_std: Tensor
    guide_mean: Tensor
    guide_std: Tensor
    decoder: ActionDecoder | None

    def __init__(
        self, config: PolicyConfig, spec: PolicySpec, latent: LatentActionSpec | None = None
    ) -> None:
        super().__init__()
        self.config, self.spec, self.latent = config, spec, latent
        self.decoder = None
        numbers = spec.target.size if spec.target.kind == "continuous" else 0
        tokens = spec.guide.size if spec.guide else 0
        for name, size in (("", numbers), ("state_", spec.state_size), ("guide_", tokens)):
            self.register_buffer(f"{name}mean", torch.zeros(size))
            self.register_buffer(f"{name}std", torch.ones(size))

    @abstractmethod
    def features(self, frames: Tensor, state: Tensor | None, words: Tensor) -> Float[Tensor, "b d"]:
        """Return one feature vector per observation ``[b, d]``, the input of the last layers.

        Args:
            frames: uint8 ``[b, n_obs_steps, c, h, w]``, latest last; any height and width.
            state: float32 ``[b, s]`` in the dataset's units (see `normal_state`), or None.
            words: float32 ``[b, v]``, count of each word of `spec.words` in the task text.
        """

    @abstractmethod
    def forward(
        self, frames: Tensor, state: Tensor | None, words: Tensor, guide: Tensor | None = None
    ) -> Float[Tensor, "b l f"]:
        """Return normalized values, or logits of all classes of all tokens.

        Args:
            frames: as in `features`.
            state: as in `features`.
            words: as in `features`.
            guide: float32 ``[b, offsets, k * d]``, NaN without a guide; None for policies without one.

        Returns:
            float32 ``[b, chunk_size, spec.target.outputs]``.
        """

    def forward_with_features(
        self, frames: Tensor, state: Tensor | None, words: Tensor, guide: Tensor | None = None
    ) -> tuple[Float[Tensor, "b l f"], Float[Tensor, "b d"]]:
        """Return the results of `forward` and of `features`; override it to compute both in one pass."""
        return self(frames, state, words, guide), self.features(frames, state, words)

    @property
    def output_layer(self) -> nn.Linear | None:
        """The last layer of `forward`, which PPO initializes; None if it is not linear."""
        return None

    @property
    def targets(self) -> Targets:
        """What the policy learns from."""
        return self.config.targets(self.latent, self.spec.action_space)

    @property
    def uses_state(self) -> bool:
        """Whether the network or the decoder takes the robot state."""
        return self.config.network.use_state or (self.decoder is not None and self.decoder.config.use_state)

    @property
    def augments(self) -> tuple[str, ...]:
        """Inputs that training can augment: "frames", if they are images, and "state"."""
        inputs = {"frames": self.uses_frames, "state": self.uses_state}
        return tuple(name for name, used in inputs.items() if used)

    @property
    def uses_frames(self) -> bool:
        """Whether the network uses frames."""
        return uses_frames(self.config)

    def add_decoder(self, config: DecoderConfig) -> None:
        """Append a decoder with random weights to the network."""
        assert self.spec.action_space is not None
        state = self.spec.state_size if config.use_state else 0
        target, size, codes = self.spec.target, self.spec.target.outputs, 0
        if config.mixture:
            space = self.spec.action_space
            if (
                self.latent is None
                or target.kind != "classes"
                or target.num_tokens != 1
                or not space.discrete
            ):
                raise UserError(
                    f"decoder.mixture needs one code per step and discrete actions, got {target.num_tokens} "
                    f"x {target.kind} and {space.kind} actions. Set it to false, or train the policy with "
                    "policy.target=codes on labels with one code."
                )
            size, codes = self.latent.token_dim, target.size
        self.decoder = ActionDecoder(config, size, state, self.spec.action_space, self.spec.stride, codes)

    def ground(
        self,
        config: DecoderConfig,
        actions: ActionSpace,
        states: Float[np.ndarray, "n s"] | None = None,
        camera: str = "",
    ) -> Policy:
        """Return a copy of this policy with a new decoder from latent to robot actions.

        Args:
            config: settings of the decoder.
            actions: robot action space.
            states: states of the robot, for a policy that was trained on video without states.
            camera: camera of the robot, for a policy that was trained on video without camera keys.
        """
        spec = replace(self.spec, action_space=actions, camera=self.spec.camera or camera)
        new = states if config.use_state and not spec.state_size else None
        if new is not None:
            spec = replace(spec, state_size=new.shape[1])
        grounded = self.config.build(spec, self.latent)
        grounded.add_decoder(config)
        own = {k: v for k, v in self.state_dict().items() if not k.startswith("decoder.")}
        if new is not None:
            del own["state_mean"], own["state_std"]
        grounded.load_state_dict(grounded.state_dict() | own)
        grounded._set_state_stats(new)
        return grounded

    def set_action_stats(
        self, target: np.ndarray, state: np.ndarray | None, guide: np.ndarray | None = None
    ) -> None:
        """Set means and standard deviations of targets, states and guide tokens, ``[n, f]`` each."""
        if self.spec.target.kind == "continuous":
            self.mean.copy_(torch.from_numpy(target.mean(0)))
            std = torch.from_numpy(target.std(0))
            # Latent dimensions share a unit: one that hardly varies is not scaled up to the others.
            self.std.copy_(std.clamp(min=max(1e-4, 1e-2 * std.max().item() if self.latent else 0.0)))
        self._set_state_stats(state)
        if guide is not None:
            self.guide_mean.copy_(torch.from_numpy(guide.mean(0)))
            self.guide_std.copy_(torch.from_numpy(guide.std(0)).clamp(min=1e-4))

    def _set_state_stats(self, state: np.ndarray | None) -> None:
        if state is not None:
            self.state_mean.copy_(torch.from_numpy(state.mean(0)))
            self.state_std.copy_(torch.from_numpy(state.std(0)).clamp(min=1e-4))

    def normal_frames(self, frames: Tensor) -> Float[Tensor, "b o c size size"]:
        """Return frames in -0.5..0.5 at the policy's resolution (bilinear, antialiased)."""
        size = (self.spec.resolution,) * 2
        if frames.shape[-2:] != size:
            flat = frames.flatten(0, 1).float()
            flat = F.interpolate(flat, size, mode="bilinear", antialias=True)
            frames = flat.unflatten(0, frames.shape[:2])
        return frames.float().div(255).sub(0.5)

    def normal_state(self, state: Tensor | None) -> Tensor:
        """Return the state at zero mean and unit variance.

        Raises:
            UserError: the state has the wrong size.
        """
        if state is None or state.shape[1] != self.spec.state_size:
            got = "none" if state is None else str(state.shape[1])
            raise UserError(
                f"observation.state must have {self.spec.state_size} values, got {got}. Give the state that "
                f"the policy was trained on."
            )
        return (state - self.state_mean) / self.state_std

    def normal_guide(self, guide: Tensor | None, batch_size: int) -> Float[Tensor, "b g"]:
        """Return normalized tokens followed by 1, or zeros without a guide or where dropout hides it."""
        assert self.spec.guide is not None
        if guide is None:
            width = self.spec.guide.size * len(self.spec.guide.offsets) + 1
            return self.guide_mean.new_zeros(batch_size, width)
        present = guide.isfinite().flatten(1).all(1)
        if self.training and self.spec.guide.dropout:
            present = present & (torch.rand(len(guide), device=guide.device) >= self.spec.guide.dropout)
        tokens = ((guide.nan_to_num() - self.guide_mean) / self.guide_std).flatten(1)
        return torch.cat([tokens, torch.ones_like(tokens[:, :1])], dim=1) * present[:, None]

    def normal_latent(self, latent: Shaped[Tensor, "b f"]) -> Float[Tensor, "b f2"]:
        """Return latent actions as input of the decoder: normalized values, or one-hot codes."""
        if self.spec.target.kind == "continuous":
            return (latent - self.mean) / self.std
        if self.decoder is not None and self.decoder.config.mixture:
            return self.decoder.codebook[latent[:, 0].long()]
        return F.one_hot(latent.long(), self.spec.target.size).flatten(1).float()

    def normal_target(self, target: Float[Tensor, "b l f"]) -> Float[Tensor, "b l f"]:
        """Return continuous targets at zero mean and unit variance."""
        return (target.nan_to_num() - self.mean) / self.std

    @property
    def initialized_by(self) -> int:
        """Number of samples that `initialize` needs; 0: it is not called."""
        return 0

    def initialize(self, batch: PolicyBatch) -> None:
        """Prepare a new policy, after `set_action_stats` and before training, from some of its samples."""

    def loss(self, batch: PolicyBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss over unmasked targets: cross-entropy, or squared error of normalized values."""
        out = self(batch.frames, batch.state, batch.words, batch.guide)
        if self.spec.target.kind == "classes":
            logits = out.unflatten(2, (self.spec.target.num_tokens, self.spec.target.size))
            target = batch.target.masked_fill(~batch.mask[..., None], 0)
            each = F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="none")
            each = each.view(target.shape)
        else:
            each = (out - self.normal_target(batch.target)).square()
        loss = (each.mean(2) * batch.mask).sum() / batch.mask.sum().clamp(min=1)
        return loss, {}

    def action_loss(self, batch: PolicyBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of robot actions, through the decoder if there is one.

        Args:
            batch: batch whose targets are the robot actions of every environment step, ``[b, l * stride,
                a]``.
        """
        if self.decoder is None:
            return self.loss(batch)
        actions = batch.target[..., 0] if self.decoder.space.discrete else batch.target
        return self.decoder.action_loss(self.action_scores(batch), actions, batch.mask), {}

    def decoder_input(self, out: Float[Tensor, "b l f"]) -> Float[Tensor, "b l f"]:
        """Return outputs as input of the decoder: normalized vectors, or the probability of every class."""
        if self.spec.target.kind == "continuous":
            return out
        logits = out.unflatten(-1, (self.spec.target.num_tokens, self.spec.target.size))
        return logits.softmax(-1).flatten(-2)

    def action_scores(self, batch: PolicyBatch) -> Float[Tensor, "b l a"]:
        """Return logits of discrete or normalized continuous actions, one row per environment step."""
        out = self(batch.frames, batch.state, batch.words, batch.guide)
        if self.decoder is None:
            return out
        state = self.normal_state(batch.state) if self.decoder.config.use_state else None
        if self.decoder.config.mixture:
            return self.decoder.mix(self.decoder_input(out), state)
        return self.decoder(self.decoder_input(out), state)

    @torch.no_grad()
    def actions(self, batch: PolicyBatch, choose: Choose = greedy) -> np.ndarray:
        """Return robot actions: classes selected by `choose`, int64 ``[b, l]``, or float32 ``[b, l, a]``.

        Raises:
            UserError: the policy is not grounded, or its outputs are not finite.
        """
        space = self.spec.action_space
        if space is None:
            raise UserError(
                "the policy must output robot actions, got latent actions. Ground it first: latentact ground "
                "--help."
            )
        scores = self.action_scores(batch)
        if not scores.isfinite().all():
            raise UserError(
                "the actions of the policy must be finite, got NaN or infinity. Train it again with a lower "
                "learning rate."
            )
        if space.discrete:
            return choose(scores).numpy(force=True)
        if self.decoder is not None:
            return self.decoder.unnormalize(scores).float().numpy(force=True)
        return (scores * self.std + self.mean).float().numpy(force=True)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the checkpoint atomically; with robot actions it is also a LeRobot pretrained policy."""
        with atomic_dir(Path(folder)) as partial:
            self.write(partial)

    def write(self, folder: Path) -> None:
        """Write the checkpoint's files into an existing folder."""
        save_tensors(folder / WEIGHTS, self.state_dict())
        if self.latent:
            self.latent.save(folder / "spec.json")
        decoder = to_dict(self.decoder.config) if self.decoder else None
        values = {"policy": to_dict(self.config), "spec": to_dict(self.spec), "decoder": decoder}
        if self.spec.action_space is not None:
            values |= self._write_lerobot_files(folder, self.spec.action_space)
        write_json(folder / "config.json", values)

    def _write_lerobot_files(self, folder: Path, actions: ActionSpace) -> dict[str, Any]:
        """Write LeRobot's processor files and return its entries of `config.json`."""
        entries = config_entries(
            camera=self.spec.camera,
            resolution=self.spec.resolution,
            channels=self.spec.channels,
            state_size=self.spec.state_size if self.uses_state else 0,
            actions=actions,
            n_obs_steps=self.config.network.n_obs_steps,
            latent=self.latent,
        )
        for name, content in processor_files(entries).items():
            write_json(folder / name, content)
        return entries

    def push_to_hub(self, repo_id: str, private: bool | None = None) -> str:
        """Upload the checkpoint to the Hugging Face hub and return its URL."""
        return push_folder(self.write, repo_id, private)

    @classmethod
    def from_pretrained(cls, where: str | Path, device: str = "cpu") -> Policy:
        """Load a policy of any kind from a folder or a hub id, in evaluation mode.

        Raises:
            UserError: the checkpoint is missing, truncated or not a policy; nothing in it is executed.
        """
        folder = resolve_folder(where)
        values = read_json(folder / "config.json")
        known = isinstance(values, dict) and {"policy", "spec", "decoder"} <= values.keys()
        if not known or not isinstance(values["policy"], dict):
            raise UserError(
                f"{folder} must be a policy, got another checkpoint. Give the folder of a train-policy or "
                "ground run."
            )
        with naming(folder / "config.json"):
            config = from_dict(POLICIES.get(str(values["policy"].get("kind"))), values["policy"], "policy")
            decoder = from_dict(DecoderConfig, values["decoder"], "decoder") if values["decoder"] else None
            spec = from_dict(PolicySpec, _current_target(values["spec"]), "spec")
            if decoder and spec.action_space is None:
                raise UserError(
                    "spec.action_space must be set for a decoder, got none. Ground the policy again."
                )
        latent = load_spec(folder / "spec.json") if (folder / "spec.json").exists() else None
        tensors = load_tensors(folder / WEIGHTS)

        def build() -> Policy:
            policy = config.build(spec, latent)
            if decoder:
                policy.add_decoder(decoder)
            return policy

        with settings_of(folder):
            with torch.device("meta"):  # sizes that do not fit the file fail before memory is allocated
                require_weights(build(), tensors, folder / WEIGHTS)
            policy = build()
        load_weights(policy, tensors, folder / WEIGHTS)
        return policy.eval().to(device)


def _current_target(spec: Any) -> Any:
    """Return a saved spec with the current name of continuous targets, formerly "numbers"."""
    target = spec.get("target") if isinstance(spec, dict) else None
    if isinstance(target, dict) and target.get("kind") == "numbers":
        return {**spec, "target": {**target, "kind": "continuous"}}
    return spec
