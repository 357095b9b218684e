"""Prediction targets of forward dynamics: pixels, averaged features of the encoder, or frozen features.

ema_features: features of a moving average of the model's own encoder (LAOM, 2502.00379). frozen_features:
features of any vision backbone of timm or transformers, as in UniVLA (2505.06111), computed once by
`frozen_features.py`.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from latentact.errors import UserError, require_one_of
from latentact.lams.contract import LatentActionModel
from latentact.nn.conditioned_mlp import ConditionedMlp
from latentact.nn.impala import Impala
from latentact.nn.patch import PatchEncoder, PreciseLinear
from latentact.types import Clip

KINDS = ("pixels", "ema_features", "frozen_features")


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """Prediction target of forward dynamics."""

    kind: str = "pixels"
    """pixels, ema_features (of a moving average of the encoder) or frozen_features (of a backbone)."""
    backbone: str = ""
    """frozen_features: timm/NAME, or the hub id or folder of a vision model of transformers."""
    grid: int = 4
    """frozen_features: features are averaged to a grid of this many cells per side."""
    size: int = 0
    """frozen_features: features per frame; set by train-lam."""
    features: int = 256
    """ema_features: features per frame."""
    hidden: int = 1024
    """Width of forward dynamics in feature space."""
    tau: float = 0.001
    """ema_features: weight of the encoder in its moving average at each step."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        require_one_of("lam.target.kind", self.kind, KINDS)
        if (self.kind == "frozen_features") != bool(self.backbone):
            raise UserError(
                f"lam.target.backbone must be set for frozen_features, such as timm/resnet18, and empty "
                f"for other kinds, got {self.backbone!r} for {self.kind}."
            )
        if self.grid < 1 or not 0 < self.tau <= 1:
            raise UserError(
                f"lam.target.grid must be at least 1 and lam.target.tau in 0..1, got {self.grid} and "
                f"{self.tau:g}."
            )


def frame_encoder(
    backbone: str,
    in_channels: int,
    size: int,
    *,
    scale: int,
    patch: int,
    channels: tuple[int, ...],
    features: int = 256,
    precise: bool = False,
    keypoints: int = 0,
) -> nn.Module:
    """Return a network from an image to a vector.

    Args:
        backbone: impala or patch.
        in_channels: channels of the image.
        size: height and width of the image in pixels.
        scale: impala: multiplier of the channels (16, 32, 32).
        patch: patch: side of a patch.
        channels: patch: channels of the levels.
        features: length of the vector.
        precise: whether the vector has full precision under autocast too. Half precision would drown the
            differences between consecutive frames in their common part.
        keypoints: patch: number of keypoints.

    Raises:
        UserError: the backbone is unknown.
    """
    if backbone == "impala":
        net = Impala(in_channels, size, (16 * scale, 32 * scale, 32 * scale), features)
    elif backbone == "patch":
        net = PatchEncoder(in_channels, size, patch, channels, features, keypoints=keypoints)
    else:
        raise UserError(f"lam.backbone must be impala or patch, got {backbone!r}.")
    if precise:
        net.fc = PreciseLinear(net.fc.in_features, features)
    return net


class FeatureFdm(nn.Module):
    """Forward dynamics between the features of two timesteps.

    Args:
        config: the features.
        latent_dim: length of a latent action.
        encoder: ema_features: network from observations to features.
        own: ema_features: whether this module owns and trains `encoder`; otherwise the caller trains it and
            passes its features.
    """

    def __init__(
        self, config: TargetConfig, latent_dim: int, encoder: nn.Module | None = None, own: bool = True
    ) -> None:
        super().__init__()
        if config.kind == "frozen_features" and not config.size:
            raise UserError(
                "lam.target.size must be set for frozen_features, got 0. Use train-lam, which sets it."
            )
        self.config = config
        self.encoder = encoder if own else None
        self.average = None if encoder is None else deepcopy(encoder).requires_grad_(False)
        size = config.size if encoder is None else config.features
        self.norm_now = nn.BatchNorm1d(size, affine=False)
        self.norm_after = nn.BatchNorm1d(size, affine=False)
        self.mlp = ConditionedMlp(size, latent_dim, config.hidden, size)

    def update_average(self, encoder: nn.Module) -> None:
        """Update the moving average with the weights of an encoder, in training."""
        if self.average is None or not self.training:
            return
        with torch.no_grad():
            for mean, now in zip(self.average.parameters(), encoder.parameters(), strict=True):
                mean.lerp_(now.to(mean.dtype), self.config.tau)

    def loss(
        self, latent: Float[Tensor, "b z"], now: Float[Tensor, "b f"], after: Float[Tensor, "b f"]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the squared error of the predicted features, standardized over the batch.

        Args:
            latent: latent actions.
            now: features of the current frame.
            after: features of the next frame, without gradient.
        """
        with torch.autocast(latent.device.type, enabled=False):
            after = after.detach().float()
            health, target, now = feature_health(after), self.norm_after(after), self.norm_now(now.float())
        predicted = self.mlp(now, latent)
        recon = (predicted.float() - target).square().mean()
        return recon, {"recon": recon.detach(), **health}

    def of_clip(
        self, latent: Float[Tensor, "b z"], frames: Float[Tensor, "b t c h w"], clip: Clip, at: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of the transition from frame `at` of the clip, from its frames or features."""
        if self.encoder is None:
            if clip.features is None:
                raise UserError(
                    f"clip.features must hold the features of {self.config.backbone}, got none. Train with "
                    f"train-lam, which computes them."
                )
            return self.loss(latent, clip.features[:, at], clip.features[:, at + 1])
        self.update_average(self.encoder)
        assert self.average is not None
        with torch.no_grad():
            after = self.average(frames[:, at + 1])
        return self.loss(latent, self.encoder(frames[:, at]), after)


def feature_health(features: Float[Tensor, "b f"]) -> dict[str, Tensor]:
    """Return metrics of feature collapse, without synchronizing with the device.

    Returns:
        feature_std: mean standard deviation over the batch, relative to the mean magnitude of features (0: a
        constant). feature_rank: effective rank of the features, tr(C)^2 / tr(C^2) of
        their covariance C (1: all on a line).
    """
    x = features.detach().float()
    centered = x - x.mean(0)
    gram = centered @ centered.T
    total = gram.diagonal().sum()
    std = centered.square().mean(0).sqrt().mean() / x.abs().mean().clamp(min=1e-12)
    return {"feature_std": std, "feature_rank": total.square() / gram.square().sum().clamp(min=1e-30)}


def pixel_error(
    predicted: Tensor, now: Tensor, target: Tensor, motion_weight: float, motion_dilation: int
) -> Tensor:
    """Return the squared error of images, weighted by the change of each pixel.

    Args:
        predicted: images in -0.5..0.5 ``[b, c, h, w]``.
        now: current images.
        target: next images.
        motion_weight: extra weight: 1 + motion_weight * min(|change|, 0.5).
        motion_dilation: pixels by which the weight extends around changing pixels.
    """
    error = (predicted.float() - target).square()
    if motion_weight:
        motion = (target - now).abs().amax(1, keepdim=True).clamp(max=0.5)
        if motion_dilation:
            motion = F.max_pool2d(motion, 2 * motion_dilation + 1, 1, motion_dilation)
        error = error * (1 + motion_weight * motion)
    return error.mean()


def no_pixel_decoder_error(model: LatentActionModel) -> UserError:
    """Return the error of `predict` for a model that does not predict pixels."""
    return UserError(
        f"this {model.spec.model} model has no forward dynamics of pixels and predicts no frames. Train "
        f"one with lam.target.kind=pixels."
    )
