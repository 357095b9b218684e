"""CLAM: continuous latent actions with a jointly trained action decoder (arXiv 2505.04999).

Inverse dynamics from three timesteps to a small vector, forward dynamics from two timesteps and that vector,
unrolled over `steps` steps on its own predictions, and an MLP that decodes the robot action on labeled steps,
trained jointly. Timesteps are images, robot states or both.
Departure from the paper: latent actions are whitened, so that they cannot collapse.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Shaped, UInt8
from torch import Tensor, nn

from latentact.config import choice
from latentact.errors import UserError
from latentact.lams.contract import (
    LAMS,
    LatentActionModel,
    action_loss,
    at_steps,
    batched,
    normalize_frames,
    require_states,
    window_steps,
)
from latentact.lams.targets import (
    FeatureFdm,
    TargetConfig,
    frame_encoder,
    no_pixel_decoder_error,
    pixel_error,
)
from latentact.nn.mlp import mlp
from latentact.nn.patch import PatchUNet
from latentact.nn.unet import UNet
from latentact.quantizers.none import WhitenedConfig
from latentact.quantizers.quantizer import QUANTIZERS, BottleneckConfig, Quantized
from latentact.types import ActionSpace, Clip, LatentActions


@LAMS.register("clam")
@dataclass(frozen=True, kw_only=True)
class ClamConfig:
    """Settings of CLAM; the sizes of latent action and decoder are the published ones."""

    kind: str = "clam"
    """Registered name."""
    observations: str = "pixels"
    """pixels, state (the robot state only) or both."""
    state_size: int = 0
    """Size of the robot state, for state and both; 0 for pixels."""
    backbone: str = "impala"
    """impala (with LAPO's U-Net) or patch."""
    size: int = 64
    """Height and width to which frames are resized, 32..256 pixels; for impala a multiple of 32."""
    idm_scale: int = 4
    """impala: multiplier of the IDM's channels (16, 32, 32)."""
    fdm_base: int = 24
    """impala: channels of the U-Net's first level."""
    patch: int = 8
    """patch: side of a patch in pixels."""
    idm_channels: tuple[int, ...] = (64,)
    """patch: channels of the IDM's levels; each further level halves the resolution."""
    fdm_channels: tuple[int, ...] = (96,)
    """patch: channels of the FDM's levels."""
    hidden: int = 1024
    """Width of the two hidden layers of the state networks."""
    bottleneck: BottleneckConfig = choice(QUANTIZERS, WhitenedConfig(dim=8))
    """Bottleneck of the latent action: none, kl, or one with codes."""
    target: TargetConfig = field(default_factory=TargetConfig)
    """Prediction target of the image FDM; feature targets need steps=1."""
    steps: int = 1
    """k: steps that the FDM predicts, each from its previous prediction."""
    fdm_context: int = 1
    """Timesteps before the current one in the FDM's input, 0 or 1; 0 makes it rely on the latent action."""
    difference_input: float = 0.0
    """Scale of the difference (next - current) as extra input channels of the IDM; 0: none."""
    motion_weight: float = 0.0
    """Extra loss weight of changing pixels: 1 + motion_weight * min(|change|, 0.5)."""
    motion_dilation: int = 0
    """Pixels by which the motion weight extends around changing pixels."""
    state_weight: float = 1.0
    """Loss weight of the FDM's error on standardized states."""
    action_weight: float = 0.0
    """Loss weight of the action decoder on labeled steps (published: 1 for states, 0.01 for images); 0 builds
    none."""
    decoder: tuple[int, ...] = (1024, 1024, 1024)
    """Widths of the action decoder's hidden layers."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        if self.observations not in ("pixels", "state", "both"):
            raise UserError(f"lam.observations must be pixels, state or both, got {self.observations!r}.")
        if (self.observations == "pixels") == bool(self.state_size):
            raise UserError(
                f"lam.state_size must be the size of the data's robot state for state and both, and 0 for "
                f"pixels, got {self.state_size} for {self.observations}."
            )
        if not 32 <= self.size <= 256 or (self.backbone == "impala" and self.size % 32):
            raise UserError(
                f"lam.size must be between 32 and 256, for impala a multiple of 32, got {self.size}."
            )
        if self.fdm_context not in (0, 1):
            raise UserError(f"lam.fdm_context must be 0 or 1, got {self.fdm_context}.")
        if self.steps < 1 or (self.steps > 1 and self.target.kind != "pixels"):
            raise UserError(
                f"lam.steps must be at least 1, and 1 for feature targets, got {self.steps} for "
                f"lam.target.kind={self.target.kind}."
            )
        if min((1, *self.decoder)) < 1:
            raise UserError(f"lam.decoder must hold widths of at least 1, got {list(self.decoder)}.")
        if self.observations == "state" and self.target.kind != "pixels":
            raise UserError(
                f"lam.target.kind must be pixels for lam.observations=state, got {self.target.kind}."
            )

    def with_action_head(self, weight: float) -> ClamConfig | None:
        """Return the settings with an action head of this loss weight."""
        return replace(self, action_weight=weight)

    def build(self, actions: ActionSpace | None = None) -> Clam:
        """Return the model with random weights."""
        if self.action_weight and actions is None:
            raise UserError(
                f"lam.action_weight must be 0 for data without robot actions, got {self.action_weight:g}."
            )
        return Clam(self, actions)


@dataclass(frozen=True)
class _Observations:
    """Observations of consecutive timesteps: images in -0.5..0.5, standardized states, or both."""

    x: Float[Tensor, "b t c h w"] | None
    s: Float[Tensor, "b t s"] | None

    def cut(self, start: int, stop: int) -> _Observations:
        return _Observations(*(None if v is None else v[:, start:stop] for v in (self.x, self.s)))

    def replaced(self, at: int, by: _Observations) -> _Observations:
        """Return the observations with timestep `at` replaced by the single timestep of `by`."""

        def put(old: Tensor | None, new: Tensor | None) -> Tensor | None:
            if old is None or new is None:
                return old
            return torch.cat([old[:, :at], new.to(old.dtype), old[:, at + 1 :]], dim=1)

        return _Observations(put(self.x, by.x), put(self.s, by.s))


class Clam(LatentActionModel):
    """CLAM with the networks and the bottleneck of its config, and one timestep of context."""

    context = 1
    action_mean: Tensor
    action_std: Tensor

    def __init__(self, config: ClamConfig, actions: ActionSpace | None = None) -> None:
        super().__init__(config)
        c = self.config = config
        self.horizon, self.state_size = c.steps, c.state_size
        self.actions = actions if c.action_weight else None
        self.bottleneck = c.bottleneck.build()
        latent_dim = self.bottleneck.tokens * self.bottleneck.token_dim
        self.uses_images = c.observations != "state"
        inputs = {"frames": self.uses_images, "state": bool(c.state_size)}
        self.augments = tuple(name for name, used in inputs.items() if used)
        self.generative = self.uses_images and c.target.kind == "pixels"
        if self.uses_images:
            channels = 12 if c.difference_input else 9
            self.encoder = self._frame_encoder(channels)
            self.fdm = self._fdm(latent_dim)
        if self.state_size:
            s, before = c.state_size, (1 + c.fdm_context) * c.state_size
            self.state_norm = nn.BatchNorm1d(s, affine=False)
            self.state_encoder = mlp(3 * s, (c.hidden, c.hidden), 256)
            self.state_fdm = mlp(before + latent_dim, (c.hidden, c.hidden), s)
        self.idm_head = nn.Linear(
            256 * (self.uses_images + bool(self.state_size)), self.bottleneck.in_features
        )
        self.action_decoder = mlp(latent_dim, c.decoder, self.actions.size) if self.actions else None
        action_dim = self.actions.size if self.actions and not self.actions.discrete else 0
        self.register_buffer("action_mean", torch.zeros(action_dim))
        self.register_buffer("action_std", torch.ones(action_dim))
        self.spec = self._new_spec(
            c.size,
            tokens=self.bottleneck.tokens,
            token_dim=self.bottleneck.token_dim,
            codebook_size=self.bottleneck.codebook_size,
        )

    def _frame_encoder(self, channels: int, features: int = 256, precise: bool = False) -> nn.Module:
        c = self.config
        return frame_encoder(
            c.backbone, channels, c.size, scale=c.idm_scale, patch=c.patch, channels=c.idm_channels,
            features=features, precise=precise,
        )  # fmt: skip

    def _fdm(self, latent_dim: int) -> nn.Module:
        c, frames = self.config, 1 + self.config.fdm_context
        if c.target.kind != "pixels":
            own = c.target.kind == "ema_features"
            encoder = self._frame_encoder(3, c.target.features, precise=True) if own else None
            return FeatureFdm(c.target, latent_dim, encoder)
        if c.backbone == "impala":
            return UNet(3 * frames, latent_dim, 3, c.fdm_base, c.size)
        return PatchUNet(3 * frames, latent_dim, 3, c.patch, c.fdm_channels)

    def encode(
        self,
        frames: UInt8[Tensor, "*b t c h w"],
        valid: Bool[Tensor, "*b t"] | None = None,
        last: bool = False,
        states: Float32[Tensor, "*b t s"] | None = None,
    ) -> LatentActions:
        """Return latent actions of images, states or both, depending on `observations`."""
        frames, valid = batched(frames, valid, last)
        steps, transition_valid = window_steps(valid, self.context, last)
        s = self._states(states)
        observations = _Observations(
            normalize_frames(at_steps(frames, steps), self.config.size) if self.uses_images else None,
            None if s is None else at_steps(s, steps),
        )
        return self._to_latent_actions(self._infer(observations), transition_valid)

    def predict(
        self, frames: UInt8[Tensor, "b t c h w"], vectors: Float[Tensor, "b k d"]
    ) -> UInt8[Tensor, "b c h2 w2"]:
        """Return the next frame at the model's size, uint8."""
        if not self.generative:
            raise no_pixel_decoder_error(self)
        older = frames[:, [max(-2, -frames.shape[1]), -1]]
        predicted = self._predict_pixels(normalize_frames(older, self.config.size), vectors.flatten(1))
        return ((predicted + 0.5) * 255).round().clamp(0, 255).to(torch.uint8)

    def set_action_stats(self, actions: Shaped[Tensor, "n *a"]) -> None:
        """Set mean and standard deviation of continuous actions from the labeled steps."""
        if len(self.action_mean):
            self.action_mean.copy_(actions.mean(0))
            self.action_std.copy_(actions.std(0).clamp(min=1e-4))

    def loss(self, clip: Clip) -> tuple[Tensor, dict[str, Tensor]]:
        """Return mean prediction loss of the steps + bottleneck loss + action loss on labeled steps."""
        observations = _Observations(
            normalize_frames(clip.frames, self.config.size) if self.uses_images else None,
            self._states(clip.states),
        )
        augmented = self._augmented(observations, clip)
        device = clip.frames.device
        total, recon, prediction = torch.zeros((), device=device), torch.zeros((), device=device), None
        first, metrics = None, {}
        for step in range(self.config.steps):
            window = observations.cut(step, step + 3)
            if prediction is not None:
                window = window.replaced(1, prediction)
            latent = self._infer(window if augmented is None else augmented.cut(step, step + 3))
            target = observations.cut(step + 1, step + 3)
            error, step_metrics, prediction = self._step(window, target, latent.vectors, clip)
            recon = recon + error.detach() / self.config.steps
            total = total + (error + latent.loss) / self.config.steps
            if first is None:
                first, metrics = latent, step_metrics | latent.metrics
        metrics["recon"] = recon
        if self.action_decoder is not None and clip.action is not None and clip.labeled is not None:
            assert first is not None
            action = clip.action
            if len(self.action_mean):
                action = (action - self.action_mean) / self.action_std
            decoded = action_loss(self.action_decoder(first.vectors), action, clip.labeled)
            metrics["action"] = decoded.detach()
            total = total + self.config.action_weight * decoded
        return total, metrics

    def _augmented(self, observations: _Observations, clip: Clip) -> _Observations | None:
        """Return augmented observations, at every timestep those of the data; None without augmentation."""
        x, s = observations.x, observations.s
        if x is not None and clip.observed is not None:
            x = normalize_frames(clip.observed, self.config.size)
        if s is not None and clip.state_noise is not None:
            s = s + clip.state_noise[:, None]
        return None if x is observations.x and s is observations.s else _Observations(x, s)

    def _step(
        self, window: _Observations, target: _Observations, latent: Tensor, clip: Clip
    ) -> tuple[Tensor, dict[str, Tensor], _Observations]:
        """Return the prediction error of the window's third timestep, metrics, and the prediction.

        Args:
            window: input of the FDM, whose second timestep may be its own prediction.
            target: the observed second and third timestep.
            latent: the latent action between them.
            clip: the batch, for the features of its first step.
        """
        c, error, metrics, x, s = self.config, torch.zeros((), device=latent.device), {}, None, None
        if window.x is not None and target.x is not None:
            if isinstance(self.fdm, FeatureFdm):
                error, metrics = self.fdm.of_clip(latent, window.x, clip, 1)
            else:
                x = self._predict_pixels(window.x[:, :2], latent)
                error = pixel_error(x, target.x[:, 0], target.x[:, 1], c.motion_weight, c.motion_dilation)
        if window.s is not None and target.s is not None:
            before = window.s[:, 1 - c.fdm_context : 2].flatten(1)
            s = window.s[:, 1] + self.state_fdm(torch.cat([before, latent], dim=1))
            state = F.mse_loss(s.float(), target.s[:, 1])
            error, metrics = error + c.state_weight * state, {**metrics, "state": state.detach()}
        return error, metrics, _Observations(*(None if v is None else v[:, None] for v in (x, s)))

    def _infer(self, window: _Observations) -> Quantized:
        """Return latent actions of three timesteps."""
        parts = []
        if window.x is not None:
            frames = [*window.x.unbind(1)]
            if gain := self.config.difference_input:
                frames.append((window.x[:, 2] - window.x[:, 1]) * gain)
            parts.append(self.encoder(torch.cat(frames, dim=1)))
        if window.s is not None:
            parts.append(F.relu(self.state_encoder(window.s.flatten(1))))
        return self.bottleneck(self.idm_head(torch.cat(parts, dim=1)))

    def _predict_pixels(self, x: Tensor, latent: Tensor) -> Tensor:
        """Return the next image, in -0.5..0.5, after two images and a latent action."""
        before = x[:, 1 - self.config.fdm_context :].flatten(1, 2)
        if self.config.backbone == "impala":
            return self.fdm(before, latent)
        grain = self.config.patch * 2 ** (len(self.config.fdm_channels) - 1)
        pad, size = -self.config.size % grain, self.config.size
        change = self.fdm(F.pad(before, (0, pad, 0, pad), mode="replicate"), latent)
        return x[:, 1] + change[..., :size, :size]

    def _states(self, states: Tensor | None) -> Tensor | None:
        """Return standardized states; None if the model does not use them."""
        states = require_states(self, states)
        if states is None:
            return None
        with torch.autocast(states.device.type, enabled=False):
            return self.state_norm(states.float().flatten(0, 1)).unflatten(0, states.shape[:2])
