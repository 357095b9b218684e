"""LAOM: latent actions among distractors, from features rather than pixels (arXiv 2502.00379).

No quantizer; inverse dynamics between the current observation and one k steps ahead, k drawn from 1 to
`horizon`; forward dynamics of one step between features, against a moving average of the encoder; every
observation shifted, rotated or put in perspective; a linear head that reads the action of few labeled steps.
Departures: the package's encoders end in a vector, whose numbers inverse and forward dynamics count in
deviations of the batch; latent actions are whitened so that they cannot collapse. A pixel network that learns
from the latent actions and teaches them nothing may be added, for pictures and reconstruction errors.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Shaped, UInt8
from torch import Tensor, nn

from latentact.errors import UserError
from latentact.lams.contract import LAMS, LatentActionModel, action_loss, normalize_frames, pairs
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
    """Height and width that the model works at, 32..256 pixels."""
    scale: int = 6
    """impala: multiplier of the channels (16, 32, 32)."""
    patch: int = 8
    """patch: side of a patch in pixels."""
    channels: tuple[int, ...] = (64,)
    """patch: channels of the levels; each further level halves the resolution."""
    stack: int = 3
    """Frames that make an observation."""
    horizon: int = 10
    """K: inverse dynamics in training looks 1 to K steps ahead; of one step when it labels."""
    hidden: int = 1024
    """Width of inverse dynamics."""
    bottleneck: BottleneckConfig = field(default_factory=lambda: BottleneckConfig(kind="none", dim=8192))
    """Latent actions without codes: none or kl. With labels 64 numbers do nearly as well as 8192."""
    target: TargetConfig = field(default_factory=lambda: TargetConfig(kind="ema_features", features=1024))
    """What forward dynamics predicts: ema_features or frozen_features; `features` is also the encoder's."""
    augment: str = "observation"
    """observation: each of the observations of a transition moves by itself, as published; clip: they move
    together, so that small movements stay what they are; none."""
    action_weight: float = 0.0
    """Weight of the linear head's loss on labeled steps (published: 0.001 to 0.01); 0 builds none."""
    picture_channels: tuple[int, ...] = ()
    """Channels of the levels of the pixel network; empty: there is none and the model predicts no frames."""
    motion_weight: float = 0.0
    """Extra weight of pixels that change, for the pixel network: 1 + motion_weight * min(|change|, 0.5)."""

    def __post_init__(self) -> None:
        """Refuse values that no model can be built from."""
        if not 32 <= self.size <= 256:
            raise UserError(f"lam.size is {self.size}; wanted 32..256 pixels.")
        for name in ("stack", "horizon"):
            if getattr(self, name) < 1:
                raise UserError(f"lam.{name} is {getattr(self, name)}; wanted at least 1.")
        if self.bottleneck.kind not in ("none", "kl"):
            raise UserError(f"lam.bottleneck.kind is {self.bottleneck.kind}; laom wants none or kl.")
        if self.target.kind == "pixels":
            raise UserError("lam.target.kind is pixels; laom wants ema_features or frozen_features.")
        if self.augment not in ("observation", "clip", "none"):
            raise UserError(f"lam.augment is {self.augment!r}; wanted observation, clip or none.")

    def build(self, actions: ActionSpace | None = None) -> Laom:
        """Return the model with random weights."""
        if self.action_weight and actions is None:
            raise UserError("lam.action_weight wants robot actions and the data has none; leave it 0.")
        return Laom(self, actions)


class Laom(LatentActionModel):
    """LAOM with the networks of its config; sees `stack - 1` frames of context."""

    action_mean: Tensor
    action_std: Tensor

    def __init__(self, config: LaomConfig, actions: ActionSpace | None = None) -> None:
        super().__init__(config)
        self.config: LaomConfig = config
        self.context, self.horizon = config.stack - 1, config.horizon
        self.generative = bool(config.picture_channels)
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
        self.bottleneck = QUANTIZERS.get(config.bottleneck.kind)(config.bottleneck)
        latent_dim = self.bottleneck.token_dim
        self.idm = ConditionedMlp(2 * features, 2 * features, config.hidden, self.bottleneck.in_features)
        averaged = self.encoder if config.target.kind == "ema_features" else None
        self.fdm = FeatureFdm(config.target, latent_dim, averaged, own=False)
        self.action_head = nn.Linear(latent_dim, self.actions.size) if self.actions else None
        numbers = self.actions.size if self.actions and not self.actions.discrete else 0
        self.register_buffer("action_mean", torch.zeros(numbers))
        self.register_buffer("action_std", torch.ones(numbers))
        self.pictures = (
            PatchUNet(3, latent_dim, 3, config.patch, config.picture_channels)
            if config.picture_channels
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
    ) -> LatentActions:
        """Return the latent actions of single steps."""
        windows, real = pairs(frames, valid, self.context, last)
        x = normalize_frames(windows, self.config.size)
        latent, _ = self._infer(x[:, :-1], x[:, 1:])
        return self._to_latent_actions(latent, real)

    def predict(
        self, frames: UInt8[Tensor, "b t c h w"], vectors: Float[Tensor, "b k d"]
    ) -> UInt8[Tensor, "b c h2 w2"]:
        """Return what the pixel network makes of the last frame, uint8."""
        if self.pictures is None:
            raise no_pixel_decoder_error(self)
        predicted = self._picture(
            normalize_frames(frames[:, -1:], self.config.size)[:, 0], vectors.flatten(1)
        )
        return ((predicted + 0.5) * 255).round().clamp(0, 255).to(torch.uint8)

    def set_action_stats(self, actions: Shaped[Tensor, "n *a"]) -> None:
        """Take mean and deviation of continuous actions from the labeled steps."""
        if len(self.action_mean):
            self.action_mean.copy_(actions.mean(0))
            self.action_std.copy_(actions.std(0).clamp(min=1e-4))

    def loss(self, clip: Clip) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward dynamics in feature space + the bottleneck's loss + the action head's on labeled steps."""
        c = self.config
        x = normalize_frames(clip.frames, c.size)
        b, device = len(x), x.device
        ahead = torch.randint(1, c.horizon + 1, (b, 1), device=device)
        steps = torch.arange(c.stack, device=device)
        future = x[torch.arange(b, device=device)[:, None], steps + ahead]
        now, after, future = self._augmented(x[:, : c.stack], x[:, 1 : c.stack + 1], future)
        latent, features = self._infer(now, future)
        if self.fdm.average is not None:
            self.fdm.follow(self.encoder)
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
        if self.pictures is not None:
            shown, real = x[:, self.context], x[:, self.context + 1]
            error = pixel_error(
                self._picture(shown, self._seen(x)), shown, real, self.config.motion_weight, 1
            )
            metrics["picture"] = error.detach()
            total = total + error
        return total, metrics

    def _augmented(self, *observations: Tensor) -> list[Tensor]:
        if self.config.augment == "none" or not self.training:
            return [*observations]
        if self.config.augment == "observation":
            return [augment(each) for each in observations]
        return [*augment(torch.cat(observations, dim=1)).split(self.config.stack, dim=1)]

    def _infer(self, now: Tensor, later: Tensor) -> tuple[Quantized, Tensor]:
        """Observations `[b, stack, c, h, w]` to latent actions, and the features of the first one."""
        features = self.encoder(torch.cat([now, later]).flatten(1, 2))
        with torch.autocast(features.device.type, enabled=False):
            both = torch.cat(self.norm(features).chunk(2), dim=1)
        return self.bottleneck(self.idm(both, both)), features[: len(now)]

    @torch.no_grad()
    def _seen(self, x: Tensor) -> Tensor:
        """Return the latent action of the step from the current frame, as labeling would."""
        training = self.training
        self.eval()
        latent, _ = self._infer(x[:, : self.config.stack], x[:, 1 : self.config.stack + 1])
        self.train(training)
        return latent.vectors

    def _picture(self, now: Tensor, latent: Tensor) -> Tensor:
        assert self.pictures is not None
        grain = self.config.patch * 2 ** (len(self.config.picture_channels) - 1)
        pad, size = -self.config.size % grain, self.config.size
        x = nn.functional.pad(now, (0, pad, 0, pad), mode="replicate")
        return (x + self.pictures(x, latent))[..., :size, :size]
