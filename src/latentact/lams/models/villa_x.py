"""villa-X's latent action model: a spatio-temporal transformer over windows of frames (arXiv 2507.23682).

The IDM takes `d_t` frames at once and pools each transition into a few quantized tokens; the FDM is a vision
transformer on one frame and one action token. Weights keep their published names. `window: sliding` gives the
results of the published `idm`; with `chunked`, windows overlap by one frame only, as in training.
The proprio FDM of the paper is unreleased; ours has one hidden layer from latent action, robot state and a
learned embodiment token to the next state and the action.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Float32, Int64, Shaped, UInt8
from torch import Tensor, nn

from latentact.config import from_dict
from latentact.errors import UserError
from latentact.io.atomic import read_json
from latentact.io.tensors import WEIGHTS, load_tensors, load_weights
from latentact.lams.contract import LAMS, LatentActionModel, action_loss, batched, normalize_frames
from latentact.nn.st_transformer import StDecoder, StEncoder
from latentact.quantizers.vq import Vq, VqConfig
from latentact.types import ActionSpace, Clip, LatentActions

CONFIG = "model_config.json"
PASS = {"cpu": 8, "cuda": 512, "mps": 64}  # frames per forward pass of the encoder; more are slower
OURS = (
    "kind",
    "decoder",
    "window",
    "guard",
    "augment",
    "action_weight",
    "state_weight",
    "state_size",
)
"""Settings that published configurations do not have."""


@LAMS.register("villa_x")
@dataclass(frozen=True, kw_only=True)
class VillaXConfig:
    """Settings of villa-X's LAM; names and defaults are the published ones (201 M parameters)."""

    kind: str = "villa_x"
    """Registered name."""
    resolution: int = 224
    """Height and width to which frames are resized, in pixels."""
    patch_size: int = 14
    """Side of a patch in pixels."""
    d_t: int = 8
    """Frames per window of the IDM."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLPs, in multiples of the width."""
    encoder_depth: int = 12
    """Blocks of the IDM."""
    encoder_embed_dim: int = 768
    """Width of the IDM."""
    encoder_n_heads: int = 8
    """Attention heads of the IDM's blocks."""
    st_use_qk_norm: bool = True
    """Whether the IDM normalizes queries and keys."""
    num_learned_tokens: int = 4
    """Tokens of a latent action."""
    action_latent_dim: int = 128
    """Size of a token."""
    map_heads: int = 24
    """Attention heads of the pooling into tokens."""
    n_codes: int = 32
    """Entries of the codebook, shared by all tokens."""
    decoder_depth: int = 8
    """Blocks of the FDM."""
    decoder_embed_dim: int = 768
    """Width of the FDM."""
    decoder_n_heads: int = 16
    """Attention heads of the FDM."""
    use_qk_norm: bool = True
    """Whether the FDM normalizes queries and keys."""
    random_crop_scale: tuple[float, float] = (0.8, 1.0)
    """Area of a random crop in training, as a fraction of the image."""
    random_crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    """Aspect ratio (width / height) of a random crop."""
    decoder: bool = True
    """Whether the model has an FDM; some published checkpoints have none."""
    window: str = "sliding"
    """sliding: each transition from its last d_t frames, as published; chunked: windows overlap by one frame,
    many times faster on long clips."""
    guard: bool = True
    """Whether unused codes restart from current features, in training."""
    augment: bool = True
    """Whether training crops each clip at random."""
    action_weight: float = 0.0
    """Loss weight of the proprio FDM on actions of labeled steps; 0: no actions."""
    state_weight: float = 0.0
    """Loss weight of the proprio FDM on the next robot state; 0: no states."""
    state_size: int = 0
    """Size of the robot state, for state_weight."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        for field in fields(self):
            value, most = getattr(self, field.name), 256 if field.name.endswith("depth") else 1 << 14
            least = 0 if field.name == "state_size" else 1
            if field.type == "int" and not least <= value <= most:
                raise UserError(f"lam.{field.name} must be between {least} and {most}, got {value}.")
        if not 0.1 <= self.mlp_ratio <= 64:
            raise UserError(f"lam.mlp_ratio must be between 0.1 and 64, got {self.mlp_ratio}.")
        if self.window not in ("sliding", "chunked"):
            raise UserError(f"lam.window must be sliding or chunked, got {self.window!r}.")
        if self.d_t < 2:
            raise UserError(f"lam.d_t must be at least 2 frames, got {self.d_t}.")
        if self.state_weight and not self.state_size:
            raise UserError(
                "lam.state_size must be the size of the data's robot state with lam.state_weight, got 0."
            )
        for name, most in (("random_crop_scale", 1.0), ("random_crop_ratio", 100.0)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= most:
                raise UserError(
                    f"lam.{name} must be an ascending range in 0..{most:g}, got {low:g} to {high:g}."
                )
        for whole, part in (
            ("resolution", "patch_size"),
            ("encoder_embed_dim", "encoder_n_heads"),
            ("encoder_embed_dim", "map_heads"),
            ("decoder_embed_dim", "decoder_n_heads"),
        ):
            if getattr(self, whole) % getattr(self, part):
                raise UserError(
                    f"lam.{whole} must be a multiple of lam.{part}={getattr(self, part)}, got "
                    f"{getattr(self, whole)}."
                )
        for width in ("encoder_embed_dim", "decoder_embed_dim"):
            if getattr(self, width) % 4:
                raise UserError(f"lam.{width} must be a multiple of 4, got {getattr(self, width)}.")

    def with_action_head(self, weight: float) -> VillaXConfig | None:
        """Return the settings with an action head of this loss weight."""
        return replace(self, action_weight=weight)

    def build(self, actions: ActionSpace | None = None) -> VillaX:
        """Return the model with random weights."""
        if self.action_weight and actions is None:
            raise UserError(
                f"lam.action_weight must be 0 for data without robot actions, got {self.action_weight:g}."
            )
        return VillaX(self, actions)

    @classmethod
    def read_published(cls, path: Path, *, window: str = "sliding") -> VillaX | None:
        """Load `model.safetensors` and `model_config.json` from a folder or its `lam/`.

        Raises:
            UserError: a file is damaged, or the files do not belong together.
        """
        folder = path / "lam" if (path / "lam" / CONFIG).is_file() else path
        if not (folder / CONFIG).is_file():
            return None
        saved = read_json(folder / CONFIG)
        values = saved.get("config") if isinstance(saved, dict) else None
        if not isinstance(values, dict) or saved.get("architecture") != "IgorModel":
            raise UserError(
                f"{folder / CONFIG} does not describe a villa-X model. Give the folder of its `lam`."
            )
        if values.get("in_channels", 3) != 3:
            raise UserError(f"{folder / CONFIG}: in_channels must be 3, got {values['in_channels']!r}.")
        found = load_tensors(folder / WEIGHTS)
        tensors = {name: t.float() if t.is_floating_point() else t for name, t in found.items()}
        known = {field.name for field in fields(cls)} - {*OURS}
        ours = {
            "window": window,
            "guard": False,
            "decoder": any(name.startswith("decoder.") for name in tensors),
        }
        config = from_dict(cls, {k: v for k, v in values.items() if k in known} | ours, "lam")
        with torch.device("meta"):
            model = config.build()
        load_weights(model, tensors, folder / WEIGHTS)
        model.spec = replace(model.spec, resize="float")
        return model


class VillaX(LatentActionModel):
    """IDM, codebook, visual FDM and, with a loss weight, the proprio FDM."""

    def __init__(self, config: VillaXConfig, actions: ActionSpace | None = None) -> None:
        super().__init__(config)
        self.config: VillaXConfig = config
        self.context = config.d_t - 2
        self.transitions_per_window = config.d_t - 1 if config.window == "chunked" else 1
        self.generative = config.decoder
        self.actions = actions if config.action_weight else None
        latent_dim = config.num_learned_tokens * config.action_latent_dim
        self.encoder = StEncoder(
            size=config.resolution,
            patch=config.patch_size,
            frames=config.d_t,
            dim=config.encoder_embed_dim,
            depth=config.encoder_depth,
            heads=config.encoder_n_heads,
            mlp_ratio=config.mlp_ratio,
            qk_norm=config.st_use_qk_norm,
            pool_heads=config.map_heads,
            latents=config.num_learned_tokens,
            out_dim=config.action_latent_dim,
        )
        self.vq = Vq(
            VqConfig(
                dim=latent_dim,
                positions=config.num_learned_tokens,
                codebook_size=config.n_codes,
                guard=config.guard,
            )
        )
        if config.decoder:
            self.decoder = StDecoder(
                size=config.resolution,
                patch=config.patch_size,
                dim=config.decoder_embed_dim,
                depth=config.decoder_depth,
                heads=config.decoder_n_heads,
                mlp_ratio=config.mlp_ratio,
                qk_norm=config.use_qk_norm,
                latent_dim=latent_dim,
            )
        self.apply(_initialize)
        self.proprio = (
            Proprio(latent_dim, config.state_size, self.actions)
            if config.state_weight or self.actions
            else None
        )
        self.augments = ("frames", "state") if config.state_weight else ("frames",)
        self.spec = self._new_spec(
            config.resolution,
            tokens=config.num_learned_tokens,
            token_dim=config.action_latent_dim,
            codebook_size=config.n_codes,
        )

    @torch.no_grad()
    def encode(
        self,
        frames: UInt8[Tensor, "*b t c h w"],
        valid: Bool[Tensor, "*b t"] | None = None,
        last: bool = False,
        states: Float32[Tensor, "*b t s"] | None = None,
    ) -> LatentActions:
        """Return latent actions; frames before a clip's first valid frame are ignored."""
        frames, valid = batched(frames, valid, last)
        transition_valid = valid[:, :-1] & valid[:, 1:]
        selected = transition_valid.clone()
        selected[:, :-1] &= not last
        clip, now = selected.nonzero(as_tuple=True)
        b, t = transition_valid.shape
        k, d = self.spec.tokens, self.spec.token_dim
        continuous = frames.new_zeros((b, t, k, d), dtype=torch.float32)
        vectors, codes = continuous.clone(), frames.new_zeros((b, t, k), dtype=torch.int64)
        if len(clip):
            latent = self.vq(self._latents(frames, valid, clip, now).flatten(1))
            vectors[clip, now] = latent.vectors.unflatten(1, (k, d))
            continuous[clip, now] = latent.continuous.unflatten(1, (k, d))
            codes[clip, now] = cast(Tensor, latent.codes)
        first = t - 1 if last else 0
        return LatentActions(
            vectors=vectors[:, first:],
            continuous=continuous[:, first:],
            codes=codes[:, first:],
            valid=transition_valid[:, first:],
        )

    def predict(
        self, frames: UInt8[Tensor, "b t c h w"], vectors: Float[Tensor, "b k d"]
    ) -> UInt8[Tensor, "b c h2 w2"]:
        """Return the next frame at the model's resolution, truncated to uint8."""
        if not self.generative:
            raise UserError(
                "this villa-X model has no forward dynamics and predicts no frames. Use one with decoder."
            )
        patches = self.decoder(self._pixels(frames[:, -1]), vectors.flatten(1)).float()
        x = rearrange(
            patches,
            "b (h w) (p q c) -> b c (h p) (w q)",
            h=self.config.resolution // self.config.patch_size,
            p=self.config.patch_size,
            c=3,
        )
        mean, std = _colors(x)
        return ((x * std + mean) * 255).clamp(0, 255).to(torch.uint8)

    def set_action_stats(self, actions: Shaped[Tensor, "n *a"]) -> None:
        """Set mean and standard deviation of continuous actions from the labeled steps."""
        if self.proprio is not None and len(self.proprio.action_mean):
            self.proprio.action_mean.copy_(actions.mean(0))
            self.proprio.action_std.copy_(actions.std(0).clamp(min=1e-4))

    def loss(self, clip: Clip) -> tuple[Tensor, dict[str, Tensor]]:
        """Return patch prediction loss + codebook loss + proprio loss of the last step."""
        if not self.generative:
            raise UserError("lam.decoder must be true for training, got false.")
        b, t = clip.valid.shape
        row = torch.arange(b, device=clip.valid.device)[:, None]
        steps = torch.arange(t, device=row.device)
        missing = (~clip.valid).sum(1, keepdim=True)  # frames that are not valid are all at the front
        order = (steps + missing).clamp(max=t - 1)  # attention is causal: frames after a window do not matter
        frames = clip.frames[row, order]
        if clip.observed is not None:  # the same crop
            frames = torch.cat([frames, clip.observed[row, order]], dim=1)
        x = self._pixels(self._cropped(frames)).unflatten(0, (b, -1))
        x, observed = x[:, :t], x[:, -t:]
        stems = self.encoder.stem(observed.flatten(0, 1)).unflatten(0, (b, t))
        now = torch.minimum(
            steps[:-1], t - 2 - missing
        )  # the last transition replaces those that are missing
        latent = self.vq(self.encoder(stems, t)[row, now].flatten(0, 1).flatten(1))
        predicted = self.decoder(x[row, now].flatten(0, 1), latent.vectors)
        side = self.config.patch_size
        target = rearrange(x[row, now + 1], "b t c (h p) (w q) -> (b t) (h w) (p q c)", p=side, q=side)
        recon = F.mse_loss(predicted.float(), target)
        total = recon + latent.loss
        metrics = {"recon": recon.detach(), "vq": latent.loss.detach(), **latent.metrics}
        if self.proprio is not None:
            for name, value in self.proprio.losses(latent.vectors.unflatten(0, (b, -1))[:, -1], clip).items():
                total = total + getattr(self.config, f"{name}_weight") * value
                metrics[name] = value.detach()
        return total, metrics

    def _latents(
        self,
        frames: UInt8[Tensor, "b t c h w"],
        valid: Bool[Tensor, "b t"],
        clip: Int64[Tensor, " m"],
        now: Int64[Tensor, " m"],
    ) -> Float[Tensor, "m k d"]:
        """Encode transitions `now` of clips in the fewest windows that give the exact result.

        Temporal attention is causal, so one window serves all transitions of its last kept frames.

        Index spaces: m requested transitions, at frame `now[m]` of `clip[m]`; their window is frames
        `start[m]` to `stop[m]`. w distinct windows; `which[m]` is the window of transition m. A window has
        `length[w]` frames, and its last `keep[w]` - 1 transitions are returned. `parts` are rows of all
        returned transitions; those of window w begin at row `begin[w]`.
        """
        t, reach = frames.shape[1], self.config.d_t - 1
        steps = torch.arange(t, device=frames.device)
        start = torch.where(valid, 0, steps + 1).cummax(1).values[clip, now]
        stop = torch.where(valid, t - 1, steps - 1).flip(1).cummin(1).values.flip(1)[clip, now]
        if self.config.window == "chunked":
            start = start + (now - start) // reach * reach
            stop = torch.minimum(start + reach, stop)
        else:
            stop = torch.maximum(now + 1, torch.minimum(start + reach, stop))
            start = torch.maximum(start, stop - reach)
        windows, which = torch.stack([clip, start, stop], 1).unique(dim=0, return_inverse=True)
        earliest = now.new_full((len(windows),), t).scatter_reduce(0, which, now, "amin")
        length, keep = windows[:, 2] - windows[:, 1] + 1, windows[:, 2] - earliest + 1
        first = windows[:, 0] * t + windows[:, 1]
        begin, parts, done = torch.zeros_like(keep), [], 0
        for n, k in torch.stack([length, keep], 1).unique(dim=0).tolist():
            members = ((length == n) & (keep == k)).nonzero()[:, 0]
            for some in members.split(16):  # windows that share per-frame work
                rows, back = (first[some, None] + steps[:n]).unique(return_inverse=True)
                stems = self.encoder.stem(self._pixels(frames.flatten(0, 1)[rows]))
                together = back.split(max(1, PASS[frames.device.type] // n))
                parts += [self.encoder(stems[each], k).float().flatten(0, 1) for each in together]
                begin[some] = done + torch.arange(len(some), device=begin.device) * (k - 1)
                done += len(some) * (k - 1)
        return torch.cat(parts)[begin[which] + now - earliest[which]]

    def _pixels(self, frames: UInt8[Tensor, "*n c h w"]) -> Float[Tensor, "m c h2 w2"]:
        """Return frames at the model's size with the color statistics of ImageNet."""
        x = normalize_frames(frames.flatten(0, -4)[None], self.config.resolution)[0] + 0.5
        mean, std = _colors(x)
        return (x - mean) / std

    def _cropped(self, frames: UInt8[Tensor, "b t c h w"]) -> UInt8[Tensor, "b t c h w"]:
        """Return randomly cropped clips at the model's size in training, else the clips."""
        if not (self.training and self.config.augment):
            return frames
        from torchvision.transforms import RandomResizedCrop
        from torchvision.transforms.functional import resized_crop

        size, out = [self.config.resolution] * 2, []
        scale, ratio = [*self.config.random_crop_scale], [*self.config.random_crop_ratio]
        for clip in frames:
            box = RandomResizedCrop.get_params(clip, scale, ratio)
            out.append(resized_crop(clip, *box, size, antialias=True))
        return torch.stack(out)


class Proprio(nn.Module):
    """Forward dynamics of the robot: latent action, state and embodiment to next state and action.

    A dataset has one robot, hence one learned embodiment token.
    """

    action_mean: Tensor
    action_std: Tensor

    def __init__(self, latent_dim: int, state_size: int, actions: ActionSpace | None) -> None:
        super().__init__()
        width = 256
        self.state_norm = nn.BatchNorm1d(state_size, affine=False) if state_size else None
        self.enter = nn.Linear(latent_dim + state_size, width)
        self.embodiment = nn.Parameter(torch.randn(width) * 0.02)
        self.state_head = nn.Linear(width, state_size) if state_size else None
        self.action_head = nn.Linear(width, actions.size) if actions else None
        action_dim = actions.size if actions and not actions.discrete else 0
        self.register_buffer("action_mean", torch.zeros(action_dim))
        self.register_buffer("action_std", torch.ones(action_dim))

    def losses(self, latent: Float[Tensor, "b d"], clip: Clip) -> dict[str, Tensor]:
        """Return the losses of the last transition; unlabeled actions are ignored."""
        state = after = None
        if self.state_norm is not None:
            size = 0 if clip.states is None else clip.states.shape[2]
            if clip.states is None or size != self.state_norm.num_features:
                raise UserError(
                    f"lam.state_size must be the size of the data's robot state, {size}, got "
                    f"{self.state_norm.num_features}."
                )
            state, after = self.state_norm(torch.cat([*clip.states[:, -2:].unbind(1)])).chunk(2)
        noise = clip.state_noise
        noisy = state if state is None or noise is None else state + noise
        x = torch.cat([latent] if noisy is None else [latent, noisy], dim=1)
        x = F.gelu(self.enter(x) + self.embodiment)
        losses = {}
        if self.state_head is not None and state is not None and after is not None:
            losses["state"] = F.mse_loss((state + self.state_head(x)).float(), after)
        if self.action_head is not None:
            action = clip.action
            assert action is not None
            assert clip.labeled is not None
            if len(self.action_mean):
                action = (action - self.action_mean) / self.action_std
            losses["action"] = action_loss(self.action_head(x), action, clip.labeled)
        return losses


def _colors(like: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of ImageNet colors, for `[..., 3, h, w]`."""
    mean, std = like.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    return mean, std


def _initialize(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight.flatten(1))
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
