"""What forward dynamics is asked to predict: pixels, its own averaged features, or those of a frozen network.

ema_features: a moving average of the model's own encoder (LAOM, 2502.00379). frozen_features: those of any
vision backbone of timm or transformers, as in UniVLA (2505.06111), computed once by `frozen_features.py`.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from latentact.errors import UserError
from latentact.lams.contract import LatentActionModel
from latentact.nn.conditioned_mlp import ConditionedMlp
from latentact.nn.impala import Impala
from latentact.nn.patch import PatchEncoder
from latentact.types import Clip

KINDS = ("pixels", "ema_features", "frozen_features")


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """Settings of what forward dynamics predicts."""

    kind: str = "pixels"
    """pixels, ema_features (of a moving average of the own encoder) or frozen_features (of a backbone)."""
    backbone: str = ""
    """frozen_features: timm/NAME, or the hub id or folder of a vision model of transformers."""
    grid: int = 4
    """frozen_features: features are averaged to this many cells along each side of the picture."""
    size: int = 0
    """frozen_features: numbers per frame; train-lam finds it."""
    features: int = 256
    """ema_features: numbers per frame."""
    hidden: int = 1024
    """Width of the forward dynamics in feature space."""
    tau: float = 0.001
    """ema_features: share of the encoder that enters its average at each step."""

    def __post_init__(self) -> None:
        """Refuse values that no model can be built from."""
        if self.kind not in KINDS:
            raise UserError(f"lam.target.kind is {self.kind!r}; wanted one of {', '.join(KINDS)}.")
        if (self.kind == "frozen_features") != bool(self.backbone):
            raise UserError(
                f"lam.target.kind is {self.kind} and lam.target.backbone is {self.backbone!r}; "
                f"frozen_features wants a backbone such as timm/resnet18, and the others want none."
            )
        if self.grid < 1 or not 0 < self.tau <= 1:
            raise UserError(
                f"lam.target.grid is {self.grid} and lam.target.tau {self.tau:g}; wanted at least 1 and 0..1."
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
) -> nn.Module:
    """Return a network from a picture to a vector.

    Args:
        backbone: impala or patch.
        in_channels: channels of the picture.
        size: its height and width in pixels.
        scale: impala: multiplier of the channels (16, 32, 32).
        patch: patch: side of a patch.
        channels: patch: channels of the levels.
        features: length of the vector.
        precise: whether the vector is in full precision also under autocast. Half precision would drown how
            two successive pictures differ in what all pictures have in common.

    Raises:
        UserError: the backbone is unknown.
    """
    if backbone == "impala":
        net = Impala(in_channels, size, (16 * scale, 32 * scale, 32 * scale), features)
    elif backbone == "patch":
        net = PatchEncoder(in_channels, size, patch, channels, features)
    else:
        raise UserError(f"lam.backbone is {backbone!r}; wanted impala or patch.")
    if precise:
        net.fc = _PreciseLinear(net.fc.in_features, features)
    return net


class _PreciseLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float())


class FeatureFdm(nn.Module):
    """Forward dynamics between the features of two moments.

    Args:
        config: which features.
        latent_dim: length of a latent action.
        encoder: ema_features: network from observations to features.
        own: ema_features: whether `encoder` is this module's own, trained through its use here; otherwise the
            caller trains it and hands over its features.
    """

    def __init__(
        self, config: TargetConfig, latent_dim: int, encoder: nn.Module | None = None, own: bool = True
    ) -> None:
        super().__init__()
        if config.kind == "frozen_features" and not config.size:
            raise UserError("frozen features are found by train-lam; build the model with lam.target.size=N.")
        self.config = config
        self.encoder = encoder if own else None
        self.average = None if encoder is None else deepcopy(encoder).requires_grad_(False)
        size = config.size if encoder is None else config.features
        self.norm_now = nn.BatchNorm1d(size, affine=False)
        self.norm_after = nn.BatchNorm1d(size, affine=False)
        self.mlp = ConditionedMlp(size, latent_dim, config.hidden, size)

    def follow(self, encoder: nn.Module) -> None:
        """Move the average a step towards an encoder, in training."""
        if self.average is None or not self.training:
            return
        with torch.no_grad():
            for mean, now in zip(self.average.parameters(), encoder.parameters(), strict=True):
                mean.lerp_(now.to(mean.dtype), self.config.tau)

    def loss(
        self, latent: Float[Tensor, "b z"], now: Float[Tensor, "b f"], after: Float[Tensor, "b f"]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the squared error of the predicted features, each number in deviations of the batch.

        Args:
            latent: latent actions.
            now: features of the current moment.
            after: those of the next one, which get no gradient.
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
        """Return the loss of the transition from moment `at` of the clip, from its frames or its features."""
        if self.encoder is None:
            if clip.features is None:
                raise UserError(
                    f"the features of {self.config.backbone} are not there; train with train-lam, which "
                    f"computes them."
                )
            return self.loss(latent, clip.features[:, at], clip.features[:, at + 1])
        self.follow(self.encoder)
        assert self.average is not None
        with torch.no_grad():
            after = self.average(frames[:, at + 1])
        return self.loss(latent, self.encoder(frames[:, at]), after)


def feature_health(features: Float[Tensor, "b f"]) -> dict[str, Tensor]:
    """Return whether features have collapsed, without a wait for the device.

    Returns:
        feature_std: mean deviation of a number over the batch, relative to the mean size of the numbers (0: a
        constant). feature_rank: effective number of directions in which features vary, tr(C)^2 / tr(C^2) of
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
    """Return the squared error of pictures, weighted by how much each pixel changes.

    Args:
        predicted: pictures in -0.5..0.5 ``[b, c, h, w]``.
        now: what they start from.
        target: what they ought to be.
        motion_weight: extra weight: 1 + motion_weight * min(|change|, 0.5).
        motion_dilation: pixels by which the weight spreads around what changes.
    """
    error = (predicted.float() - target).square()
    if motion_weight:
        motion = (target - now).abs().amax(1, keepdim=True).clamp(max=0.5)
        if motion_dilation:
            motion = F.max_pool2d(motion, 2 * motion_dilation + 1, 1, motion_dilation)
        error = error * (1 + motion_weight * motion)
    return error.mean()


def no_pixel_decoder_error(model: LatentActionModel) -> UserError:
    """Return the error for `predict` of a model whose target is no pictures."""
    return UserError(
        f"this {model.spec.model} model has no forward dynamics of pictures and predicts none; train one "
        f"whose target is pixels for that."
    )
