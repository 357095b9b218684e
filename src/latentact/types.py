"""Data types shared by the packages of latentact.

Shape letters: b batch, t time, k latent tokens per step, d dimensions per token, c h w image, a action, s
state, n frames.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from latentact.errors import UserError

if TYPE_CHECKING:  # at run time this would import torch into `import latentact` and every collecting process
    from jaxtyping import Bool, Float32, Int64, Shaped, UInt8
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ActionSpace:
    """A space of robot actions: `size` discrete classes, or `size` continuous dimensions."""

    kind: Literal["discrete", "continuous"]
    size: int
    values: tuple[int, ...] = ()
    """Value of each class in the data and in the environment; empty: 0 to size - 1."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        if self.kind not in ("discrete", "continuous") or self.size < 1:
            raise UserError(
                f"an action space must be discrete or continuous with a size of at least 1, got {self.kind} "
                f"with {self.size}."
            )
        if self.values and (not self.discrete or len({*self.values}) != self.size):
            raise UserError(
                f"an action space must have a value for each of its {self}, got {len({*self.values})}."
            )

    @property
    def discrete(self) -> bool:
        """Whether the action is one of `size` classes."""
        return self.kind == "discrete"

    def __str__(self) -> str:
        """Human-readable form, e.g. "4 classes"."""
        return f"{self.size} {'classes' if self.discrete else 'numbers'}"


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A batch of windows of consecutive timesteps; no window spans two episodes.

    The last two frames are the transition that a model of frame pairs learns; frames before them are context.
    Context before the episode's start repeats its first frame and is not valid.
    """

    frames: UInt8[Tensor, "b t c h w"]
    """0..255."""
    valid: Bool[Tensor, "b t"]
    """False for frames that repeat the first one, before the episode's start."""
    index: Int64[Tensor, "b"]
    """Row in the dataset of the first frame of the last transition."""
    action: Shaped[Tensor, "b *a"] | None = None
    """Robot action at `index`: int64 class `[b]` or float32 `[b, a]`; zeros where not labeled."""
    labeled: Bool[Tensor, "b"] | None = None
    """Whether the action is labeled; set if `action` is."""
    state: Float32[Tensor, "b s"] | None = None
    """Robot state at `index`."""
    states: Float32[Tensor, "b t s"] | None = None
    """Robot state at every frame."""
    features: Float32[Tensor, "b t f"] | None = None
    """Features of a frozen network at every frame, only for models with a feature-space target."""
    observed: UInt8[Tensor, "b t c h w"] | None = None
    """Augmented frames, 0..255: what inverse dynamics observes in training; None: `frames`."""
    state_noise: Float32[Tensor, "b s"] | None = None
    """Added to the normalized states, where they are an input; the same at every frame."""

    @property
    def idm_frames(self) -> UInt8[Tensor, "b t c h w"]:
        """The frames that inverse dynamics observes; `frames` are the targets of forward dynamics."""
        return self.frames if self.observed is None else self.observed

    @property
    def seen(self) -> UInt8[Tensor, "b t c h w"]:
        """Deprecated name of `idm_frames`."""
        warnings.warn("Clip.seen is deprecated; use Clip.idm_frames.", DeprecationWarning, stacklevel=2)
        return self.idm_frames

    def to(self, device: str) -> Clip:
        """Return the clip on `device`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self, **{k: v.to(device, non_blocking=True) for k, v in moved.items() if v is not None}
        )


@dataclass(frozen=True, kw_only=True)
class LatentActions:
    """Latent actions of a batch of clips; entry i is the transition from frame i to frame i+1."""

    vectors: Float32[Tensor, "b t k d"]
    """After the quantizer, if there is one."""
    continuous: Float32[Tensor, "b t k d"]
    """Before the quantizer."""
    codes: Int64[Tensor, "b t k"] | None
    """Codebook indices, if there is a codebook."""
    valid: Bool[Tensor, "b t"]
    """Whether both frames of the transition are valid."""


KERNELS = ("uint8", "float", "pillow")
"""Resize kernels: in integers, the fastest; as torchvision resizes tensors; as Pillow resizes images. Results
differ by at most a gray level, by rounding."""


@dataclass(frozen=True, kw_only=True)
class LatentActionSpec:
    """The meaning of a latent action: the contract between LAM, labels and policies.

    Saved in every LAM checkpoint, label manifest and policy. Artifacts with different specs cannot be
    combined.
    """

    model: str
    """Registered name of the LAM."""
    tokens: int
    """k: latent tokens per transition."""
    token_dim: int
    """d: dims per token."""
    codebook_size: int | None
    """Number of codes, or None for latent actions without codes."""
    frame_gap: int
    """Frames between the two frames of a transition: 1 for neighbors."""
    frame_gap_s: float
    """The same in seconds; 0 before training."""
    fps: float
    """Frames per second of the training video; 0 if unknown."""
    resolution: int
    """Height and width in pixels to which the model resizes frames."""
    camera: str
    """Camera key of the training data; empty for plain video."""
    value_range: tuple[float, float] = (0.0, 255.0)
    """Value range of its input frames."""
    resize: str = "uint8"
    """Resize kernel of its training frames, one of `KERNELS`."""
    robot_actions: bool = False
    """Whether its latent actions are robot actions (supervised inverse dynamics)."""
    weights: str = ""
    """Hash of the weights (blake2b of the safetensors file); empty before saving."""

    def check_compatible(self, other: LatentActionSpec, mine: str, theirs: str) -> None:
        """Raise a UserError that names the first field in which two artifacts differ."""
        for field in fields(self):
            a, b = getattr(self, field.name), getattr(other, field.name)
            if a != b:
                remedy = "Label the data and train the policy with the same LAM."
                if field.name in ("frame_gap", "fps"):
                    remedy = "Label all data at one rate, with --target-fps, and with one --frame-gap-s."
                raise UserError(
                    f"{field.name} of the latent actions must be the same in {mine} and {theirs}, got "
                    f"{a!r} and {b!r}. {remedy}"
                )

    def save(self, path: Path) -> None:
        """Write the spec as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")
