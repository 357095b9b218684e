"""The data that parts of latentact hand to each other.

Shape letters: b batch, t time, k latent tokens per step, d numbers per token, c h w image, a action, s state,
n frames.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from latentact.errors import UserError

if TYPE_CHECKING:  # at run time this would import torch into `import latentact` and every collecting process
    from jaxtyping import Bool, Float32, Int64, Shaped, UInt8
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ActionSpace:
    """What a robot action is: `size` classes of a discrete choice, or `size` real numbers."""

    kind: Literal["discrete", "continuous"]
    size: int
    values: tuple[int, ...] = ()
    """The number that stands for each class in the data and in the environment; empty: 0 to size - 1."""

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
        """Say it in words."""
        return f"{self.size} {'classes' if self.discrete else 'numbers'}"


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A batch of windows of consecutive moments; no window spans two episodes.

    The last two frames are the transition that a pair model learns; frames before them are context. A context
    frame from before the episode's start repeats the first frame and is not valid.
    """

    frames: UInt8[Tensor, "b t c h w"]
    """0..255."""
    valid: Bool[Tensor, "b t"]
    """False where a frame was repeated because the episode has none there."""
    index: Int64[Tensor, "b"]
    """Row in the dataset of the frame from which the last transition starts."""
    action: Shaped[Tensor, "b *a"] | None = None
    """Robot action taken at `index`: int64 class `[b]` or float32 `[b, a]`; zeros where hidden."""
    labeled: Bool[Tensor, "b"] | None = None
    """Whether the action is shown; there where `action` is."""
    state: Float32[Tensor, "b s"] | None = None
    """Robot state at `index`."""
    states: Float32[Tensor, "b t s"] | None = None
    """Robot state at every moment; the last two are the transition's, as of the frames."""
    features: Float32[Tensor, "b t f"] | None = None
    """Features of a frozen network at every moment, where a model's target is such."""

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
    """After the quantizer, where there is one."""
    continuous: Float32[Tensor, "b t k d"]
    """Before the quantizer."""
    codes: Int64[Tensor, "b t k"] | None
    """Codebook indices, where there is a codebook."""
    valid: Bool[Tensor, "b t"]
    """Whether both frames of the transition are real."""


KERNELS = ("uint8", "float", "pillow")
"""How pictures are resized: in whole numbers throughout, the fastest; as torchvision resizes tensors; as
Pillow resizes pictures. They differ by a gray level where rounding does."""


@dataclass(frozen=True, kw_only=True)
class LatentActionSpec:
    """What a latent action means: the contract between LAM, labels and policies.

    Saved in every LAM checkpoint, label manifest and policy. Two artifacts with different specs refuse each
    other.
    """

    model: str
    """Registered name of the LAM."""
    tokens: int
    """k: latent tokens per transition."""
    token_dim: int
    """d: numbers per token."""
    codebook_size: int | None
    """Codes per token, or None where latent actions have no codes."""
    frame_gap: int
    """Frames between the two moments of a transition."""
    frame_gap_s: float
    """The same in seconds; 0 while the model has not seen data."""
    fps: float
    """Frames per second of the video it was trained on; 0 while unknown."""
    resolution: int
    """Height and width in pixels to which the model resizes what it is given."""
    camera: str
    """Camera key of the training data; empty for plain video."""
    value_range: tuple[float, float] = (0.0, 255.0)
    """Values of the frames it takes."""
    resize: str = "uint8"
    """How frames were resized in its training, one of `KERNELS`."""
    robot_actions: bool = False
    """Whether its latent actions are robot actions (supervised inverse dynamics)."""
    weights: str = ""
    """Hash of the weights (blake2b of the safetensors file), empty before saving."""

    def check_compatible(self, other: LatentActionSpec, mine: str, theirs: str) -> None:
        """Raise a UserError that names the first field in which two artifacts disagree."""
        for field in fields(self):
            a, b = getattr(self, field.name), getattr(other, field.name)
            if a != b:
                raise UserError(
                    f"{mine} and {theirs} hold different latent actions: {field.name} is {a!r} in the first "
                    f"and {b!r} in the second; label the data and train the policy with the same LAM."
                )

    def save(self, path: Path) -> None:
        """Write the spec as json."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")
