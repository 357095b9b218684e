"""LAQ: the latent action quantization of LAPA (arXiv 2410.11758), C-ViViT around a quantized difference.

`compat` reproduces the published code exactly, bugs included (see `nn/cvivit.py`); `read_published` builds it
from LAPA's files. Without it, the default for training, the bugs are fixed and a frame's tokens do not depend
on other frames, so that they are computed once for all transitions of the frame. Unlike the published code,
evaluation never adds noise. The loss is the squared error of the second frame plus the bottleneck's loss; the
published bottleneck, nsvq, has none. Options beyond the published model help where little of a frame moves: a
decoder that predicts the change, a motion-weighted loss, an amplified difference, and patches smaller than an
eighth of the frame.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Float32, UInt8
from torch import Tensor

from latentact.config import choice
from latentact.data.decode.resize import resize
from latentact.errors import UserError, require_between
from latentact.io.unpickle import read_pickled
from latentact.lams.contract import LAMS, LatentActionModel, transition_windows
from latentact.lams.targets import pixel_error
from latentact.nn.cvivit import CELLS, CViViT, reduction
from latentact.quantizers.nsvq import NsvqConfig
from latentact.quantizers.quantizer import QUANTIZERS, BottleneckConfig
from latentact.types import ActionSpace, Clip, LatentActions

_RESIDUAL_SCALE = 0.01  # of the decoder's initial output
_CHUNK = 16  # frames of the published size encoded together; on a CPU, more need memory and save no time


@LAMS.register("laq")
@dataclass(frozen=True, kw_only=True)
class LaqConfig:
    """Settings of LAQ; sizes are the published ones."""

    kind: str = "laq"
    """Registered name."""
    size: int = 256
    """Height and width to which frames are resized, in pixels."""
    patch: int = 32
    """Side of a patch in pixels."""
    dim: int = 1024
    """Width of a token."""
    heads: int = 16
    """Attention heads."""
    head_dim: int = 64
    """Width of an attention head."""
    spatial_depth: int = 8
    """Layers of the spatial transformers of encoder and decoder."""
    temporal_depth: int = 8
    """Layers of the temporal transformer."""
    bottleneck: BottleneckConfig = choice(QUANTIZERS, NsvqConfig(codebook_size=8, guard=True))
    """Bottleneck of the latent action; its `positions` (1, 2, 4, 16, 64 or 256) are the cells to which a
    small CNN reduces a frame."""
    residual: bool = False
    """Whether the decoder predicts the change of the current frame instead of the whole next frame."""
    motion_weight: float = 0.0
    """Extra loss weight of changing pixels: 1 + motion_weight * min(|change|, 0.5)."""
    motion_dilation: int = 0
    """Pixels by which the motion weight extends around changing pixels."""
    difference_gain: float = 1.0
    """Factor that amplifies the change of the second frame in the encoder's input; 1: unchanged."""
    compat: bool = False
    """Whether to reproduce LAPA's code exactly, bugs included."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        for name, low, high in (
            ("motion_weight", 0, 1e6),
            ("motion_dilation", 0, 64),
            ("difference_gain", 1e-3, 1e3),
        ):
            require_between(f"lam.{name}", getattr(self, name), low, high)
        if self.compat and (self.residual or self.motion_weight or self.difference_gain != 1):
            raise UserError(
                "lam.compat must be false with lam.residual, lam.motion_weight or lam.difference_gain, got "
                "true."
            )
        for name in ("size", "patch", "dim", "heads", "head_dim", "spatial_depth", "temporal_depth"):
            value, most = getattr(self, name), 256 if name.endswith("depth") else 1 << 14
            if type(value) is not int or not 1 <= value <= most:
                raise UserError(f"lam.{name} must be an integer from 1 to {most}, got {value!r}.")
        if self.size % self.patch:
            raise UserError(f"lam.size must be a multiple of lam.patch={self.patch}, got {self.size}.")
        positions, grid = self.bottleneck.positions, self.size // self.patch
        if positions not in CELLS:
            raise UserError(
                f"lam.bottleneck.positions must be one of {', '.join(map(str, CELLS))}, got {positions}."
            )

        def fits(side: int) -> bool:
            layers = reduction(side, positions)
            return layers is not None and (not self.compat or layers == CELLS[positions])

        if not fits(grid):
            nearest = min(filter(fits, range(65)), key=lambda side: abs(side - grid))
            raise UserError(
                f"lam.size / lam.patch must reduce to lam.bottleneck.positions={positions} cells, as "
                f"{nearest} does, got {grid}. Change lam.patch."
            )

    def with_action_head(self, weight: float) -> None:
        """Return None: LAQ has no action head."""

    def build(self, actions: ActionSpace | None = None) -> Laq:
        """Return the model with random weights."""
        return Laq(self)

    @classmethod
    def read_published(cls, path: Path, image_size: int = 256, code_seq_len: int = 4) -> Laq | None:
        """Load LAPA's `laq_openx.pt`, or a `vae.STEP.pt` or `vae.STEP.ema.pt` of its training.

        Args:
            path: the file, or a folder that holds one `.pt` file.
            image_size: height and width of its training frames.
            code_seq_len: codes per transition.

        Returns:
            The model, or None for other files.

        Raises:
            UserError: weights are missing, unknown or have a wrong shape.
        """
        found = _file(Path(path))
        weights = _weights(found) if found else None
        if found is None or weights is None:
            return None
        config = _sizes(weights, found, image_size, code_seq_len)
        with torch.device("meta"):
            model = Laq(config)
        own = model.state_dict()
        given = dict(_renamed(name, value) for name, value in weights.items())
        counters = {name: torch.zeros(v.shape, dtype=v.dtype) for name, v in own.items() if name in _COUNTERS}
        _check_weights({k: v for k, v in own.items() if k not in counters}, given, found)
        model.load_state_dict({k: v.float() for k, v in given.items()} | counters, assign=True)
        model.spec = replace(model.spec, resize="pillow")
        return model


_COUNTERS = ("bottleneck.used", "bottleneck.step")


class Laq(LatentActionModel):
    """LAQ with the sizes and the bottleneck of its config."""

    augments = ("frames",)

    def __init__(self, config: LaqConfig) -> None:
        super().__init__(config)
        self.config: LaqConfig = config
        places = config.bottleneck.positions
        self.bottleneck = config.bottleneck.build()
        latent = self.bottleneck.tokens * self.bottleneck.token_dim
        self._width = self.bottleneck.in_features
        for numbers in (self.bottleneck.in_features, latent):
            if numbers % places:
                raise UserError(
                    f"lam.bottleneck.dim must be a multiple of lam.bottleneck.positions={places}, got "
                    f"{numbers} for {config.bottleneck.kind}."
                )
        layers = reduction(config.size // config.patch, places)
        assert layers is not None  # the config is validated
        self.net = CViViT(
            layers=layers,
            dim=config.dim,
            heads=config.heads,
            head_dim=config.head_dim,
            spatial_depth=config.spatial_depth,
            temporal_depth=config.temporal_depth,
            patch=config.patch,
            cells=places,
            width_in=self.bottleneck.in_features // places,
            width_out=latent // places,
            compat=config.compat,
        )
        if config.residual:  # start close to copying the current frame
            with torch.no_grad():
                for parameter in self.net.to_pixels_first_frame.parameters():
                    parameter.mul_(_RESIDUAL_SCALE)
        self.spec = self._new_spec(
            config.size,
            tokens=self.bottleneck.tokens,
            token_dim=self.bottleneck.token_dim,
            codebook_size=self.bottleneck.codebook_size,
        )

    def encode(
        self,
        frames: UInt8[Tensor, "*b t c h w"],
        valid: Bool[Tensor, "*b t"] | None = None,
        last: bool = False,
        states: Float32[Tensor, "*b t s"] | None = None,
    ) -> LatentActions:
        """Return latent actions: `continuous` is the difference of cells, `vectors` are codebook rows."""
        windows, transition_valid = transition_windows(frames, valid, 0, last)
        deltas = [*self._deltas(windows)] if len(windows) else [windows.new_zeros(0, self._width).float()]
        latent = self.bottleneck(torch.cat(deltas))
        return self._to_latent_actions(latent, transition_valid)

    def predict(
        self, frames: UInt8[Tensor, "b t c h w"], vectors: Float[Tensor, "b k d"]
    ) -> UInt8[Tensor, "b c h2 w2"]:
        """Return the next frame at the model's size, uint8."""
        pixels = self.reconstruct(self._pixels(frames[:, -1:]), vectors.flatten(1))
        return (pixels.float() * 255).round().clamp(0, 255).to(torch.uint8)

    def reconstruct(
        self, pixels: Float[Tensor, "b 1 3 y x"], latent: Float[Tensor, "b f"]
    ) -> Float[Tensor, "b 3 y x"]:
        """Return the next frame, about 0..1, from the current frame in 0..1 and a flat latent action."""
        patches = self.net.patches(pixels)
        return self._decode(pixels, patches, latent, self.net.bias(patches))

    def _decode(self, pixels: Tensor, patches: Tensor, latent: Tensor, bias: Tensor) -> Tensor:
        decoded = self.net.decode(patches, latent, bias)
        return pixels[:, 0] + decoded if self.config.residual else decoded

    def loss(self, clip: Clip) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the squared error of the second frame, 0..1 scale, plus the bottleneck loss."""
        pixels = self._pixels(clip.frames[:, -2:])
        patches = self.net.patches(pixels)
        bias = self.net.bias(patches)
        observed = pixels if clip.observed is None else self._pixels(clip.observed[:, -2:])
        same = observed is pixels and self.config.difference_gain == 1
        observed_patches = patches if same else self.net.patches(self._amplified(observed))
        latent = self.bottleneck(self.net.delta(self.net.spatial_tokens(observed_patches, bias)))
        first = patches[:, :1].detach() if self.config.compat else patches[:, :1]
        now, target = pixels.unbind(1)
        predicted = self._decode(pixels, first, latent.vectors, bias)
        recon = pixel_error(predicted, now, target, self.config.motion_weight, self.config.motion_dilation)
        return recon + latent.loss, {"recon": recon.detach(), **latent.metrics}

    def _deltas(self, windows: UInt8[Tensor, "n 2 c h w"]) -> Iterator[Float[Tensor, "m f"]]:
        """Yield the inputs of the bottleneck in chunks of pairs."""
        chunks = self._chunk(windows.device)
        if self.config.compat or self.config.difference_gain != 1:
            for chunk in windows.split(chunks // 2):  # the second frame's tokens depend on the first frame
                patches = self.net.patches(self._amplified(self._pixels(chunk)))
                yield self.net.delta(self.net.spatial_tokens(patches, self.net.bias(patches)))
            return
        frames, index = _distinct(windows.flatten(0, 1))
        tokens = []
        for chunk in frames.split(chunks):
            patches = self.net.patches(self._pixels(chunk.unsqueeze(1)))
            tokens.append(self.net.spatial_tokens(patches, self.net.bias(patches))[:, 0])
        all_tokens = torch.cat(tokens)
        for pair in index.view(-1, 2).split(chunks // 2):
            yield self.net.delta(all_tokens[pair])

    def _chunk(self, device: torch.device) -> int:
        """Return the number of frames to encode together: more for a small model, and on an accelerator."""
        numbers = (self.config.size // self.config.patch) ** 2 * self.config.dim
        return _CHUNK * max(1, 2**16 // numbers) * (1 if device.type == "cpu" else 16)

    def _amplified(self, pixels: Float[Tensor, "b 2 c y x"]) -> Float[Tensor, "b 2 c y x"]:
        """Return pairs of frames with an amplified change of the second frame, for the encoder."""
        first, second = pixels.unbind(1)
        return torch.stack([first, first + self.config.difference_gain * (second - first)], dim=1)

    def _pixels(self, frames: UInt8[Tensor, "b t c h w"]) -> Float[Tensor, "b t c y x"]:
        """Return frames in 0..1 at the model's size, resized by PIL as in LAPA's preprocessing."""
        size, x = self.config.size, frames.flatten(0, 1)
        if x.shape[-2:] != (size, size):
            resized = resize(x.permute(0, 2, 3, 1).numpy(force=True), size, "pillow")
            x = torch.from_numpy(resized).permute(0, 3, 1, 2).to(x.device)
        return (x.float() / 255).unflatten(0, frames.shape[:2])


def _distinct(frames: UInt8[Tensor, "n c h w"]) -> tuple[UInt8[Tensor, "m c h w"], Tensor]:
    """Return each distinct frame once, and the index of each of `frames` among them."""
    flat = frames.flatten(1)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(1 << 62, (flat.shape[1],), generator=generator).to(flat.device)
    keys = torch.stack([(each * weights).sum() for each in flat.long()])
    unique, index = keys.unique(return_inverse=True)
    first = torch.full_like(unique, len(flat)).scatter_reduce_(
        0, index, torch.arange(len(flat), device=flat.device), "amin"
    )
    return frames[first], index


def _file(path: Path) -> Path | None:
    if path.is_file():
        return path
    files = sorted(path.glob("*.pt")) if path.is_dir() else []
    return files[0] if len(files) == 1 else None


def _weights(path: Path) -> dict[str, Any] | None:
    """Return the weights of a LAPA file by name; None for other files."""
    if path.suffix not in (".pt", ".pth"):
        return None
    values = {str(name).replace("module.", ""): value for name, value in read_pickled(path).items()}
    if averaged := {k.removeprefix("ema_model."): v for k, v in values.items() if k.startswith("ema_model.")}:
        values = averaged
    return values if any(name.startswith("enc_spatial_transformer.") for name in values) else None


def _sizes(weights: dict[str, Any], path: Path, image_size: int, code_seq_len: int) -> LaqConfig:
    """Infer the config from the shapes of the weights, `image_size` and `code_seq_len`."""

    def shape(name: str, rank: int) -> tuple[int, ...]:
        value = weights.get(name)
        if not isinstance(value, Tensor) or value.ndim != rank:
            raise UserError(
                f"{path} must hold LAPA's {name!r}, got none or a different shape. Download it again, or "
                f"give the file of another training step."
            )
        return tuple(value.shape)

    def depth(stack: str) -> int:
        parts = [name.split(".") for name in weights if name.startswith(f"{stack}.layers.")]
        return len({part[2] for part in parts if len(part) > 2})

    attention = "enc_spatial_transformer.layers.0.1"
    patch = math.isqrt(shape("to_patch_emb_first_frame.1.weight", 1)[0] // 3)
    codes, width = shape("vq.codebooks", 2)
    sizes: dict[str, Any] = {
        "patch": patch,
        "dim": shape("to_patch_emb_first_frame.2.weight", 2)[0],
        "heads": shape(f"{attention}.null_kv", 3)[0],
        "head_dim": shape(f"{attention}.q_scale", 1)[0],
        "spatial_depth": depth("enc_spatial_transformer"),
        "temporal_depth": depth("enc_temporal_transformer"),
    }
    try:
        bottleneck = NsvqConfig(dim=code_seq_len * width, positions=code_seq_len, codebook_size=codes)
        return LaqConfig(size=image_size, **sizes, bottleneck=bottleneck, compat=True)
    except UserError as error:
        raise UserError(
            f"{path} does not fit image_size={image_size!r} and code_seq_len={code_seq_len!r}. Give the "
            f"values of its training: "
            f"latentact convert-lam {path} --image-size N --code-seq-len K --out DIR."
        ) from error


def _renamed(name: str, value: Any) -> tuple[str, Any]:
    """Return a LAPA weight under our name and with our shape."""
    if name.endswith(".dsconv.weight") and isinstance(value, Tensor) and value.shape[1:2] == (1,):
        value = value.squeeze(1)
    if name == "vq.codebooks":
        return "bottleneck.codebooks", value
    return f"net.{name}".replace(".dsconv.", "."), value


def _check_weights(own: dict[str, Tensor], given: dict[str, Any], path: Path) -> None:
    """Raise a UserError unless names, shapes and types of the weights are those of the model."""
    wrong = [
        name
        for name in own.keys() & given.keys()
        if not isinstance(given[name], Tensor)
        or not given[name].is_floating_point()
        or given[name].shape != own[name].shape
    ]
    for what, names in (
        ("lacks", own.keys() - given.keys()),
        ("has unknown weights", given.keys() - own.keys()),
        ("has a wrong shape for", wrong),
    ):
        if names:
            name = sorted(names)[0].removeprefix("net.").removeprefix("bottleneck.")
            raise UserError(
                f"{path} {what} {name!r} ({len(names)} in all). The file is damaged, or image_size and "
                f"code_seq_len are not those of its training."
            )
