"""LAOM: latent actions among distractors, from features rather than pixels (arXiv 2502.00379).

No quantizer; inverse dynamics between the current observation and one k steps ahead, k drawn from 1 to
`horizon`; forward dynamics of one step between features, with a moving average of the encoder as target;
random shifts, rotations and perspectives of observations; a linear action head on few labeled steps.
Departures from the paper: the encoder outputs a vector, standardized over the batch for inverse and forward
dynamics; latent actions are whitened so that they cannot collapse. An optional pixel network, whose gradients
do not reach the latent actions, predicts images and reconstruction errors.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Float32, Shaped, UInt8
from torch import Tensor, nn

from latentact.config import choice
from latentact.errors import UserError
from latentact.lams.contract import LAMS, LatentActionModel, action_loss, normalize_frames, transition_windows
from latentact.lams.targets import (
    FeatureFdm,
    TargetConfig,
    frame_encoder,
    no_pixel_decoder_error,
    pixel_error,
)
from latentact.nn.augment import augment
from latentact.nn.conditioned_mlp import ConditionedMlp
from latentact.nn.patch import PatchUNet
from latentact.quantizers.none import WhitenedConfig
from latentact.quantizers.quantizer import QUANTIZERS, BottleneckConfig, Quantized
from latentact.types import ActionSpace, Clip, LatentActions


@LAMS.register("laom")
@dataclass(frozen=True, kw_only=True)
class LaomConfig:
    """Settings of LAOM; the defaults are the published ones."""

    kind: str = "laom"
    """Registered name."""
    backbone: str = "impala"
    """impala or patch, as in LAPO."""
    size: int = 64
    """Height and width to which frames are resized, 32..256 pixels."""
    scale: int = 6
    """impala: multiplier of the channels (16, 32, 32)."""
    patch: int = 8
    """patch: side of a patch in pixels."""
    channels: tuple[int, ...] = (64,)
    """patch: channels of the levels; each further level halves the resolution."""
    stack: int = 3
    """Frames per observation."""
    horizon: int = 10
    """K: training draws the steps of inverse dynamics from 1 to K; encoding uses 1."""
    hidden: int = 1024
    """Width of inverse dynamics."""
    bottleneck: BottleneckConfig = choice(QUANTIZERS, WhitenedConfig(dim=8192))
    """Bottleneck without codes: none or kl. With labels, dim=64 is nearly as good as 8192."""
    target: TargetConfig = field(default_factory=lambda: TargetConfig(kind="ema_features", features=1024))
    """Prediction target: ema_features or frozen_features; `features` is also the encoder's output size."""
    augment: str = "observation"
    """observation: each observation of a transition is augmented independently, as published; clip: all with
    the same parameters, which keeps small movements; none."""
    action_weight: float = 0.0
    """Loss weight of the linear action head on labeled steps (published: 0.001 to 0.01); 0 builds none."""
    image_channels: tuple[int, ...] = ()
    """Channels of the levels of the pixel network; empty: none, and the model predicts no frames."""
    motion_weight: float = 0.0
    """Pixel network: extra loss weight of changing pixels, 1 + motion_weight * min(|change|, 0.5)."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        if not 32 <= self.size <= 256:
            raise UserError(f"lam.size must be between 32 and 256 pixels, got {self.size}.")
        for name in ("stack", "horizon"):
            if getattr(self, name) < 1:
                raise UserError(f"lam.{name} must be at least 1, got {getattr(self, name)}.")
        if self.bottleneck.kind not in ("none", "kl"):
            raise UserError(f"lam.bottleneck.kind must be none or kl for laom, got {self.bottleneck.kind}.")
        if self.target.kind == "pixels":
            raise UserError("lam.target.kind must be ema_features or frozen_features for laom, got pixels.")
        if self.augment not in ("observation", "clip", "none"):
            raise UserError(f"lam.augment must be observation, clip or none, got {self.augment!r}.")

    RENAMED: ClassVar[dict[str, str]] = {"picture_channels": "image_channels"}

    def with_action_head(self, weight: float) -> LaomConfig | None:
        """Return the settings with an action head of this loss weight."""
        return replace(self, action_weight=weight)

    def build(self, actions: ActionSpace | None = None) -> Laom:
        """Return the model with random weights."""
        if self.action_weight and actions is None:
            raise UserError(
                f"lam.action_weight must be 0 for data without robot actions, got {self.action_weight:g}."
            )
        return Laom(self, actions)


class Laom(LatentActionModel):
    """LAOM with the networks of its config and `stack - 1` frames of context."""

    augments = ("frames",)
    renamed_weights = {"pictures.": "pixel_decoder."}  # noqa: RUF012
    action_mean: Tensor
    action_std: Tensor

    def __init__(self, config: LaomConfig, actions: ActionSpace | None = None) -> None:
        super().__init__(config)
        self.config: LaomConfig = config
        self.context, self.horizon = config.stack - 1, config.horizon
        self.generative = bool(config.image_channels)
        self.actions = actions if config.action_weight else None
        features = config.target.features
        self.encoder = frame_encoder(
            config.backbone,
            3 * config.stack,
            config.size,
            scale=config.scale,
            patch=config.patch,
            channels=config.channels,
            features=features,
            precise=True,
        )
        self.norm = nn.BatchNorm1d(features, affine=False)
        self.bottleneck = config.bottleneck.build()
        latent_dim = self.bottleneck.token_dim
        self.idm = ConditionedMlp(2 * features, 2 * features, config.hidden, self.bottleneck.in_features)
        averaged = self.encoder if config.target.kind == "ema_features" else None
        self.fdm = FeatureFdm(config.target, latent_dim, averaged, own=False)
        self.action_head = nn.Linear(latent_dim, self.actions.size) if self.actions else None
        action_dim = self.actions.size if self.actions and not self.actions.discrete else 0
        self.register_buffer("action_mean", torch.zeros(action_dim))
        self.register_buffer("action_std", torch.ones(action_dim))
        self.pixel_decoder = (
            PatchUNet(3, latent_dim, 3, config.patch, config.image_channels)
            if config.image_channels
            else None
        )
        self.spec = self._new_spec(
            config.size,
            tokens=1,
            token_dim=latent_dim,
            codebook_size=None,
        )

    def encode(
        self,
        frames: UInt8[Tensor, "*b t c h w"],
        valid: Bool[Tensor, "*b t"] | None = None,
        last: bool = False,
        states: Float32[Tensor, "*b t s"] | None = None,
    ) -> LatentActions:
        """Return the latent actions of single steps."""
        windows, transition_valid = transition_windows(frames, valid, self.context, last)
        x = normalize_frames(windows, self.config.size)
        latent, _ = self._infer(x[:, :-1], x[:, 1:])
        return self._to_latent_actions(latent, transition_valid)

    def predict(
        self, frames: UInt8[Tensor, "b t c h w"], vectors: Float[Tensor, "b k d"]
    ) -> UInt8[Tensor, "b c h2 w2"]:
        """Return the pixel network's prediction from the last frame, uint8."""
        if self.pixel_decoder is None:
            raise no_pixel_decoder_error(self)
        predicted = self._predict_pixels(
            normalize_frames(frames[:, -1:], self.config.size)[:, 0], vectors.flatten(1)
        )
        return ((predicted + 0.5) * 255).round().clamp(0, 255).to(torch.uint8)

    def set_action_stats(self, actions: Shaped[Tensor, "n *a"]) -> None:
        """Set mean and standard deviation of continuous actions from the labeled steps."""
        if len(self.action_mean):
            self.action_mean.copy_(actions.mean(0))
            self.action_std.copy_(actions.std(0).clamp(min=1e-4))

    def loss(self, clip: Clip) -> tuple[Tensor, dict[str, Tensor]]:
        """Return feature prediction loss + bottleneck loss + action loss on labeled steps."""
        c = self.config
        x = normalize_frames(clip.frames, c.size)
        observed = x if clip.observed is None else normalize_frames(clip.observed, c.size)
        b, device = len(x), x.device
        ahead = torch.randint(1, c.horizon + 1, (b, 1), device=device)
        steps = torch.arange(c.stack, device=device)
        future = observed[torch.arange(b, device=device)[:, None], steps + ahead]
        now, after, future = self._augmented(observed[:, : c.stack], x[:, 1 : c.stack + 1], future)
        latent, features = self._infer(now, future)
        if self.fdm.average is not None:
            self.fdm.update_average(self.encoder)
            with torch.no_grad():
                target = self.fdm.average(after.flatten(1, 2))
            recon, metrics = self.fdm.loss(latent.vectors, features.detach(), target)
        else:
            recon, metrics = self.fdm.of_clip(latent.vectors, x, clip, self.context)
        total, metrics = recon + latent.loss, metrics | latent.metrics
        if self.action_head is not None and clip.action is not None and clip.labeled is not None:
            action = clip.action
            if len(self.action_mean):
                action = (action - self.action_mean) / self.action_std
            head = action_loss(self.action_head(latent.vectors), action, clip.labeled)
            metrics["action"] = head.detach()
            total = total + c.action_weight * head
        if self.pixel_decoder is not None:
            current, target = x[:, self.context], x[:, self.context + 1]
            error = pixel_error(
                self._predict_pixels(current, self._label_latent(x)),
                current,
                target,
                self.config.motion_weight,
                1,
            )
            metrics["pixels"] = error.detach()
            total = total + error
        return total, metrics

    def _augmented(self, *observations: Tensor) -> list[Tensor]:
        if self.config.augment == "none" or not self.training:
            return [*observations]
        if self.config.augment == "observation":
            return [augment(each) for each in observations]
        return [*augment(torch.cat(observations, dim=1)).split(self.config.stack, dim=1)]

    def _infer(self, now: Tensor, later: Tensor) -> tuple[Quantized, Tensor]:
        """Return latent actions of two observations `[b, stack, c, h, w]`, and the features of the first."""
        features = self.encoder(torch.cat([now, later]).flatten(1, 2))
        with torch.autocast(features.device.type, enabled=False):
            both = torch.cat(self.norm(features).chunk(2), dim=1)
        return self.bottleneck(self.idm(both, both)), features[: len(now)]

    @torch.no_grad()
    def _label_latent(self, x: Tensor) -> Tensor:
        """Return the latent action of the next step in evaluation mode, as labeling does."""
        training = self.training
        self.eval()
        latent, _ = self._infer(x[:, : self.config.stack], x[:, 1 : self.config.stack + 1])
        self.train(training)
        return latent.vectors

    def _predict_pixels(self, now: Tensor, latent: Tensor) -> Tensor:
        assert self.pixel_decoder is not None
        grain = self.config.patch * 2 ** (len(self.config.image_channels) - 1)
        pad, size = -self.config.size % grain, self.config.size
        x = nn.functional.pad(now, (0, pad, 0, pad), mode="replicate")
        return (x + self.pixel_decoder(x, latent))[..., :size, :size]
