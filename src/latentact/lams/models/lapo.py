"""LAPO: inverse and forward dynamics around a quantized latent action (arXiv 2312.10812).

The defaults are the published model: IMPALA IDM on three stacked frames, U-Net FDM, VQ-EMA. The options train
in minutes on small data: patch networks, whitened latents instead of codes, a difference input, no FDM
context, a motion-weighted loss, and an action head on few labeled steps (as in LAOM, 2502.00379, and CLAM,
2505.04999). Grids of integers (XLand, 5x5x2) are embedded and predicted with cross-entropy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Shaped, UInt8
from torch import Tensor, nn

from latentact.config import choice
from latentact.errors import UserError, require_between
from latentact.io.tensors import load_weights
from latentact.io.unpickle import read_pickled
from latentact.lams.contract import LAMS, LatentActionModel, action_loss, normalize_frames, transition_windows
from latentact.lams.targets import (
    FeatureFdm,
    TargetConfig,
    frame_encoder,
    no_pixel_decoder_error,
    pixel_error,
)
from latentact.nn.grid import CellEncoder, CellMixer, GridDecoder, GridEncoder
from latentact.nn.patch import PatchUNet, PreciseLinear
from latentact.nn.unet import UNet
from latentact.quantizers.quantizer import QUANTIZERS, BottleneckConfig, Quantized
from latentact.quantizers.vq_ema import VqEmaConfig
from latentact.types import ActionSpace, Clip, LatentActions


@LAMS.register("lapo")
@dataclass(frozen=True, kw_only=True)
class LapoConfig:
    """Settings of LAPO; the defaults are the published ones."""

    kind: str = "lapo"
    """Registered name."""
    backbone: str = "impala"
    """impala: the published IMPALA and U-Net; patch: cheap patch networks; grid: embedded integer cells and
    convolutions; cells: embedded integer cells, an MLP, and an FDM in which the latent action moves cells."""
    size: int = 64
    """Height and width to which frames are resized, 32..256 pixels (grid, cells: cells)."""
    frame_channels: int = 3
    """Channels of a frame (grid, cells: integers per cell)."""
    grid_values: int = 32
    """grid, cells: number of values per integer."""
    idm_scale: int = 4
    """impala: multiplier of the IDM's channels (16, 32, 32)."""
    fdm_base: int = 24
    """impala: channels of the U-Net's first level."""
    patch: int = 8
    """patch: side of a patch in pixels."""
    idm_channels: tuple[int, ...] = (64,)
    """patch, grid: channels of the IDM's levels; each further level halves the resolution."""
    fdm_channels: tuple[int, ...] = (96,)
    """patch, grid: channels of the FDM's levels."""
    idm_patch: int = 0
    """patch: side of a patch in pixels in the IDM; 0: as `patch`."""
    keypoints: int = 0
    """patch: number of keypoints in the IDM, whose positions latent actions then contain to a fraction of a
    pixel; 0: none."""
    bottleneck: BottleneckConfig = choice(QUANTIZERS, "vq_ema")
    """Bottleneck of the latent action."""
    difference_input: float = 0.0
    """Scale of the difference (next - current) as extra input channels of the IDM; 0: none."""
    target: TargetConfig = field(default_factory=TargetConfig)
    """Prediction target of the FDM; for grids `pixels`, meaning cells."""
    fdm_context: int = 1
    """Frames before the current one in the FDM's input, 0 or 1; 0 makes it rely on the latent action."""
    motion_weight: float = 0.0
    """Extra loss weight of changing pixels: 1 + motion_weight * min(|change|, 0.5)."""
    motion_dilation: int = 0
    """Pixels by which the motion weight extends around changing pixels."""
    action_weight: float = 0.0
    """Loss weight of an action head on labeled steps; 0 builds none. Its output is appended to the latent
    action of every step, so that the FDM uses it and few labels suffice to decode it."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        if self.backbone not in ("impala", "patch", "grid", "cells"):
            raise UserError(f"lam.backbone must be impala, patch, grid or cells, got {self.backbone!r}.")
        if not self.integers and not 32 <= self.size <= 256:
            raise UserError(f"lam.size must be between 32 and 256 pixels, got {self.size}.")
        if self.patch < 1:
            raise UserError(f"lam.patch must be at least 1 pixel, got {self.patch}.")
        require_between("lam.idm_patch", self.idm_patch, 0, 1 << 14)
        require_between("lam.keypoints", self.keypoints, 0, 1 << 14)
        if self.keypoints and self.backbone != "patch":
            raise UserError(
                f"lam.keypoints must be 0 for lam.backbone={self.backbone}, got {self.keypoints}."
            )
        if self.fdm_context not in (0, 1):
            raise UserError(f"lam.fdm_context must be 0 or 1, got {self.fdm_context}.")
        if self.integers and not 1 <= self.size <= 64:
            raise UserError(f"lam.size must be between 1 and 64 cells, got {self.size}.")
        if self.integers and (self.difference_input or self.motion_weight):
            raise UserError(
                f"lam.difference_input and lam.motion_weight must be 0 for grids, got "
                f"{self.difference_input:g} and {self.motion_weight:g}."
            )
        if self.integers and self.target.kind != "pixels":
            raise UserError(f"lam.target.kind must be pixels for grids, got {self.target.kind}.")
        if self.action_weight and self.bottleneck.kind not in ("none", "kl"):
            raise UserError(
                f"lam.bottleneck.kind must be none or kl with lam.action_weight, got {self.bottleneck.kind}."
            )

    @property
    def integers(self) -> bool:
        """Whether frames are grids of integers."""
        return self.backbone in ("grid", "cells")

    def with_action_head(self, weight: float) -> LapoConfig | None:
        """Return the settings with an action head of this loss weight; None for bottlenecks with codes."""
        return replace(self, action_weight=weight) if self.bottleneck.kind in ("none", "kl") else None

    def build(self, actions: ActionSpace | None = None) -> Lapo:
        """Return the model with random weights."""
        if self.action_weight and actions is None:
            raise UserError(
                f"lam.action_weight must be 0 for data without robot actions, got {self.action_weight:g}."
            )
        return Lapo(self, actions)

    @classmethod
    def read_published(cls, path: Path) -> Lapo | None:
        """Load LAPO's `idm_fdm.pt` or its folder; sizes are inferred from the shapes of the weights.

        Raises:
            UserError: the file is damaged or has other networks.
        """
        file = path / "idm_fdm.pt" if path.is_dir() else path
        if not file.is_file() or file.suffix != ".pt":
            return None
        saved = read_pickled(file)
        if not (isinstance(saved.get("idm"), dict) and isinstance(saved.get("wm"), dict)):
            return None
        weights = {
            f"{ours}.{name.removeprefix('_orig_mod.')}": tensor
            for ours, theirs in (("idm", "idm"), ("fdm", "wm"))
            for name, tensor in saved[theirs].items()
            if isinstance(name, str) and isinstance(tensor, Tensor)
        }
        for theirs, ours in (("idm.policy_head.", "idm_head."), ("idm.vq.", "bottleneck.")):
            weights = {
                ours + k.removeprefix(theirs) if k.startswith(theirs) else k: v for k, v in weights.items()
            }
        try:
            codebooks, entries, width = weights["bottleneck.embedding"].shape
            dim = len(weights["idm_head.weight"])
            base, channels = weights["fdm.down.0.conv.weight"].shape[:2]
            scale = weights["idm.conv_stack.0.conv.weight"].shape[0] // 16
            cells = weights["idm.fc.weight"].shape[1] // (32 * scale)
            config = cls(
                size=8 * math.isqrt(cells),
                frame_channels=(channels - dim) // 2,
                idm_scale=scale,
                fdm_base=base,
                bottleneck=VqEmaConfig(
                    dim=dim,
                    codebooks=codebooks,
                    positions=dim // (codebooks * width),
                    codebook_size=entries,
                ),
            )
            with torch.device("meta"):
                model = config.build()
        except (LookupError, ValueError, ArithmeticError, RuntimeError) as error:
            raise UserError(
                f"{file} must hold networks of LAPO's shapes ({error}). Give its idm_fdm.pt."
            ) from error
        weights = {name: t.float() if t.is_floating_point() else t for name, t in weights.items()}
        weights |= {name: torch.zeros(0) for name in ("action_mean", "action_std")}
        load_weights(model, weights, file)
        return model


class Lapo(LatentActionModel):
    """LAPO with the networks and the bottleneck of its config, and one frame of context, as published."""

    context = 1
    action_mean: Tensor
    action_std: Tensor

    def __init__(self, config: LapoConfig, actions: ActionSpace | None = None) -> None:
        super().__init__(config)
        self.config: LapoConfig = config
        self.actions = actions if config.action_weight else None
        self.bottleneck = config.bottleneck.build()
        self.grain = {"impala": 32, "patch": config.patch * 2 ** (len(config.fdm_channels) - 1)}
        grain = self.grain.get(config.backbone, 1)
        self.inner = -(-config.size // grain) * grain
        self.idm = self._idm()
        linear = PreciseLinear if config.keypoints else nn.Linear
        width = 256 + 3 * config.keypoints
        self.idm_head = linear(width, self.bottleneck.in_features)
        self.action_head = linear(width, self.actions.size) if self.actions else None
        action_dim = self.actions.size if self.actions and not self.actions.discrete else 0
        self.register_buffer("action_mean", torch.zeros(action_dim))
        self.register_buffer("action_std", torch.ones(action_dim))
        self.fdm = self._fdm()
        self.generative = config.target.kind == "pixels"
        self.augments = () if config.integers else ("frames",)
        self.spec = self._new_spec(
            config.size,
            tokens=self.bottleneck.tokens,
            token_dim=self._latent_dim // self.bottleneck.tokens,
            codebook_size=self.bottleneck.codebook_size,
        )

    @property
    def _latent_dim(self) -> int:
        head = self.actions.size if self.actions else 0
        return self.bottleneck.tokens * self.bottleneck.token_dim + head

    def _idm(self) -> nn.Module:
        c = self.config
        if c.backbone == "cells":
            return CellEncoder(3, c.frame_channels, c.size, c.grid_values)
        if c.backbone == "grid":
            return GridEncoder(3, c.frame_channels, c.size, c.grid_values, c.idm_channels[0])
        channels = c.frame_channels * (4 if c.difference_input else 3)
        return self._frame_encoder(channels, patch=c.idm_patch, keypoints=c.keypoints)

    def _frame_encoder(
        self, channels: int, features: int = 256, precise: bool = False, patch: int = 0, keypoints: int = 0
    ) -> nn.Module:
        c = self.config
        return frame_encoder(
            c.backbone, channels, self.inner, scale=c.idm_scale, patch=patch or c.patch,
            channels=c.idm_channels, features=features, precise=precise, keypoints=keypoints,
        )  # fmt: skip

    def _fdm(self) -> nn.Module:
        c, frames = self.config, 1 + self.config.fdm_context
        if c.target.kind != "pixels":
            own = c.target.kind == "ema_features"
            encoder = self._frame_encoder(c.frame_channels, c.target.features, precise=True) if own else None
            return FeatureFdm(c.target, self._latent_dim, encoder)
        if c.backbone == "cells":
            return CellMixer(frames, c.frame_channels, c.size, c.grid_values, self._latent_dim)
        if c.backbone == "grid":
            return GridDecoder(frames, c.frame_channels, c.grid_values, self._latent_dim, c.fdm_channels[0])
        if c.backbone == "impala":
            return UNet(frames * c.frame_channels, self._latent_dim, c.frame_channels, c.fdm_base, self.inner)
        return PatchUNet(
            frames * c.frame_channels, self._latent_dim, c.frame_channels, c.patch, c.fdm_channels
        )

    def encode(
        self,
        frames: UInt8[Tensor, "*b t c h w"],
        valid: Bool[Tensor, "*b t"] | None = None,
        last: bool = False,
        states: Float32[Tensor, "*b t s"] | None = None,
    ) -> LatentActions:
        """Return latent actions; tokens are slices of LAPO's own vector, in its order."""
        windows, transition_valid = transition_windows(
            frames, valid, self.context, last, self.config.frame_channels
        )
        latent, _ = self._infer(self._pixels(windows))
        return self._to_latent_actions(latent, transition_valid)

    def predict(
        self, frames: UInt8[Tensor, "b t c h w"], vectors: Float[Tensor, "b k d"]
    ) -> UInt8[Tensor, "b c h2 w2"]:
        """Return the next frame at the model's size, uint8."""
        if not self.generative:
            raise no_pixel_decoder_error(self)
        older = frames[:, [max(-2, -frames.shape[1]), -1]]
        predicted = self._predict(self._pixels(older), vectors.flatten(1))
        if self.config.integers:
            return predicted.argmax(1).to(torch.uint8)
        size = self.config.size
        return ((predicted[..., :size, :size] + 0.5) * 255).round().clamp(0, 255).to(torch.uint8)

    def set_action_stats(self, actions: Shaped[Tensor, "n *a"]) -> None:
        """Set mean and standard deviation of continuous actions from the labeled steps."""
        if len(self.action_mean):
            self.action_mean.copy_(actions.mean(0))
            self.action_std.copy_(actions.std(0).clamp(min=1e-4))

    def loss(self, clip: Clip) -> tuple[Tensor, dict[str, Tensor]]:
        """Return reconstruction loss + bottleneck loss + action loss on labeled steps."""
        x = self._pixels(clip.frames[:, -3:])
        observed = x if clip.observed is None else self._pixels(clip.observed[:, -3:])
        latent, action_logits = self._infer(observed)
        if isinstance(self.fdm, FeatureFdm):
            recon, metrics = self.fdm.of_clip(latent.vectors, x, clip, self.context)
        else:
            recon, metrics = self._reconstruction(x, latent.vectors), {}
        total, metrics = recon + latent.loss, {"recon": recon.detach(), **metrics, **latent.metrics}
        if action_logits is not None:
            assert clip.action is not None
            assert clip.labeled is not None
            action = clip.action
            if len(self.action_mean):
                action = (action - self.action_mean) / self.action_std
            head = action_loss(action_logits, action, clip.labeled)
            metrics["action"] = head.detach()
            total = total + self.config.action_weight * head
        return total, metrics

    def _infer(self, x: Tensor) -> tuple[Quantized, Tensor | None]:
        """Return latent actions of windows `[n, 3, c, h, w]`, and the action head's logits or values."""
        if gain := self.config.difference_input:
            x = torch.cat([x, (x[:, -1:] - x[:, -2:-1]) * gain], dim=1)
        features = self.idm(x.flatten(1, 2))
        latent = self.bottleneck(self.idm_head(features))
        if self.action_head is None or self.actions is None:
            return latent, None
        logits = self.action_head(features).float()
        action = logits.softmax(1) if self.actions.discrete else logits
        vectors, continuous = (torch.cat([v, action], dim=1) for v in (latent.vectors, latent.continuous))
        return replace(latent, vectors=vectors, continuous=continuous), logits

    def _predict(self, x: Tensor, latent: Tensor) -> Tensor:
        """Return the frame after `[n, t, c, h, w]`: pixels in -0.5..0.5, or logits of grid values."""
        out = self.fdm(torch.cat(x[:, -1 - self.config.fdm_context :].unbind(1), dim=1), latent)
        return out if self.config.backbone != "patch" else x[:, -1] + out

    def _reconstruction(self, x: Tensor, latent: Tensor) -> Tensor:
        now, target = x[:, -2], x[:, -1]
        predicted = self._predict(x[:, :-1], latent)
        if self.config.integers:
            return F.cross_entropy(predicted.float(), target.long())
        return pixel_error(predicted, now, target, self.config.motion_weight, self.config.motion_dilation)

    def _pixels(self, frames: Tensor) -> Tensor:
        """Return uint8 frames `[n, t, c, h, w]` in -0.5..0.5 at the inner size; grids stay integers."""
        if self.config.integers:
            return frames
        x = normalize_frames(frames, self.config.size)
        if pad := self.inner - self.config.size:
            x = F.pad(x.flatten(0, 1), (0, pad, 0, pad), mode="replicate").unflatten(0, x.shape[:2])
        return x
