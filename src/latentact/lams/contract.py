"""The contract of latent action models, and loading of checkpoints."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int64, Shaped, UInt8
from torch import Tensor, nn

from latentact.config import from_dict, to_dict
from latentact.device import require_device
from latentact.errors import UserError, did_you_mean
from latentact.io.atomic import atomic_dir, read_json, write_json
from latentact.io.hub import push_folder, resolve_path
from latentact.io.records import naming
from latentact.io.specs import load_spec
from latentact.io.tensors import (
    WEIGHTS,
    load_tensors,
    load_weights,
    require_weights,
    save_tensors,
    settings_of,
    weights_hash,
)
from latentact.quantizers.quantizer import Quantized, Quantizer
from latentact.registry import Registry
from latentact.types import ActionSpace, Clip, LatentActions, LatentActionSpec


class LamConfig(Protocol):
    """Settings of a LAM; a frozen dataclass whose field `kind` is its registered name.

    `LAMS.register` adds the defaults of `target`, `integers` and `read_published` to a config without them.
    """

    kind: str
    target: Any = None
    """`TargetConfig` of models with several prediction targets; None: the target are pixels."""

    @property
    def integers(self) -> bool:
        """Whether frames are grids of integers instead of images."""
        return False

    @abstractmethod
    def build(self, actions: ActionSpace | None = None) -> LatentActionModel:
        """Return a model with random weights; `actions` is the space of a joint action head."""
        ...

    @abstractmethod
    def with_action_head(self, weight: float) -> LamConfig | None:
        """Return the settings with an action head of this loss weight; None if the model cannot have one."""
        ...

    @classmethod
    def read_published(cls, path: Path) -> LatentActionModel | None:
        """Return the model in a published checkpoint, for `load_lam`; None for another format.

        An override may take keywords with defaults: settings that the checkpoint lacks.

        Raises:
            UserError: the checkpoint is damaged.
        """
        return None


LAMS: Registry[type[LamConfig]] = Registry("lam", "latentact.lams.models", "latentact.lams", LamConfig)


class LatentActionModel(nn.Module, ABC):
    """A latent action model: `encode` is inverse dynamics, `predict` forward dynamics.

    Attributes:
        spec: spec of its latent actions.
        context: frames before a transition that `encode` uses.
        transitions_per_window: n if a clip of n + 1 frames costs about as much as a single transition; long
            videos are then cut into such clips, which overlap by a frame and have no context.
        horizon: frames after the current one that `loss` needs; the current one is at index `context`.
        state_size: size of the robot state that `encode` needs for every frame; 0: only frames are used.
        uses_images: whether it uses frames, not only the robot state.
        generative: whether it has forward dynamics, so that `predict` works.
        actions: action space of its joint action head, or None.
        augments: inputs that training can augment: "frames", if inverse dynamics in `loss` takes
            `clip.idm_frames`, and "state", if it adds `clip.state_noise` to the normalized states.
        renamed_weights: old -> new prefixes of weight names, for checkpoints written before a rename.
    """

    spec: LatentActionSpec
    context: int = 0
    transitions_per_window: int = 1
    horizon: int = 1
    state_size: int = 0
    uses_images: bool = True
    generative: bool = True
    actions: ActionSpace | None = None
    augments: tuple[str, ...] = ()
    renamed_weights: Mapping[str, str] = MappingProxyType({})

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.register_load_state_dict_pre_hook(_rename_weights)

    @abstractmethod
    def encode(
        self,
        frames: UInt8[Tensor, "*b t c h w"],
        valid: Bool[Tensor, "*b t"] | None = None,
        last: bool = False,
        states: Float32[Tensor, "*b t s"] | None = None,
    ) -> LatentActions:
        """Return the latent action of every transition of every clip.

        Args:
            frames: clips of any height and width; one clip without a batch axis becomes a batch of one.
            valid: False for padding of clips of unequal length; None: every frame is valid. Context before a
                clip's first valid frame repeats that frame, or is absent for models that take windows of any
                length.
            last: return, and compute, only the last transition of each clip (t - 1 becomes 1).
            states: robot state at every frame; required if `state_size` > 0, ignored otherwise.

        Returns:
            Latent actions ``[b, t - 1, k, d]``; a single frame has no transition.

        Raises:
            UserError: frames have the wrong type or number of channels, or states are missing or have the
                wrong size.
        """

    @abstractmethod
    def predict(
        self, frames: UInt8[Tensor, "b t c h w"], vectors: Float[Tensor, "b k d"]
    ) -> UInt8[Tensor, "b c h2 w2"]:
        """Return the frame after the last of `frames`, at the model's resolution.

        Raises:
            UserError: the model has no forward dynamics of pixels.
        """

    @abstractmethod
    def loss(self, clip: Clip) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the training loss of a batch and scalar metrics without gradients."""

    def codebook(self) -> Float[Tensor, "k m f"] | None:
        """Return what each code of each token adds to the vectors; None without codes, or if unknown.

        See `Quantizer.codebook`.
        """
        bottleneck = next((module for module in self.modules() if isinstance(module, Quantizer)), None)
        return None if bottleneck is None else bottleneck.codebook()

    def _new_spec(
        self,
        resolution: int,
        *,
        tokens: int,
        token_dim: int,
        codebook_size: int | None,
        robot_actions: bool = False,
    ) -> LatentActionSpec:
        """Return the spec of a new model; camera and fps are set by training."""
        return LatentActionSpec(
            model=self.config.kind,
            tokens=tokens,
            token_dim=token_dim,
            codebook_size=codebook_size,
            frame_gap=1,
            frame_gap_s=0.0,
            fps=0.0,
            resolution=resolution,
            camera="",
            robot_actions=robot_actions,
        )

    def _to_latent_actions(self, latent: Quantized, valid: Bool[Tensor, "b t"]) -> LatentActions:
        """Return the bottleneck's output, one row per transition, in the shapes of the spec."""
        shape = (*valid.shape, self.spec.tokens, self.spec.token_dim)
        return LatentActions(
            vectors=latent.vectors.reshape(shape),
            continuous=latent.continuous.reshape(shape),
            codes=None if latent.codes is None else latent.codes.reshape(shape[:3]),
            valid=valid,
        )

    def set_action_stats(self, actions: Shaped[Tensor, "n *a"]) -> None:
        """Set mean and standard deviation of continuous actions from labeled steps, if any are predicted."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json`, `model.safetensors` and `spec.json` atomically."""
        with atomic_dir(Path(folder)) as partial:
            self.write(partial)

    def write(self, folder: Path) -> None:
        """Write the checkpoint files into an existing folder and set the hash of the weights in the spec."""
        weights = save_tensors(folder / WEIGHTS, self.state_dict())
        self.spec = replace(self.spec, weights=weights)
        self.spec.save(folder / "spec.json")
        actions = to_dict(self.actions) if self.actions else None
        write_json(folder / "config.json", {"lam": to_dict(self.config), "actions": actions})

    def push_to_hub(self, repo_id: str, private: bool | None = None) -> str:
        """Upload the checkpoint to the Hugging Face hub and return its URL."""
        return push_folder(self.write, repo_id, private)

    @classmethod
    def from_pretrained(cls, where: str | Path) -> LatentActionModel:
        """Load a checkpoint of `save_pretrained`; see `load_lam`."""
        return load_lam(where)


HUB_FILES = {
    "microsoft/villa-x": ("lam/*",),
    "latent-action-pretraining/LAPA-7B-openx": ("laq_openx.pt",),
}
"""Files of a published repository that hold its latent action model."""


def load_lam(where: str | Path, device: str = "cpu", **keywords: Any) -> LatentActionModel:
    """Load a latent action model in evaluation mode, from a latentact or a published checkpoint.

    Args:
        where: folder, file or hub id of a `save_pretrained` checkpoint, or of one of villa-X, LAPO or LAPA.
        device: cpu, cuda or mps.
        keywords: settings that override those of the checkpoint (`window="chunked"`), or that it lacks
            (`image_size=256`).

    Raises:
        UserError: the checkpoint is missing, truncated, from another model or not a checkpoint; nothing in it
            is executed.
    """
    require_device(device)
    path = resolve_path(where, *([HUB_FILES[str(where)]] if str(where) in HUB_FILES else []))
    with settings_of(path):
        model = _own(path, keywords) if (path / "config.json").is_file() else _published(path, keywords)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(
                f"{path}: {name!r} must be finite, got NaN or infinite values. Copy the file again."
            )
    return model.eval().to(device)


def _rename_weights(model: LatentActionModel, tensors: dict[str, Tensor], prefix: str = "", *_: Any) -> None:
    """Replace weight names of older releases with current ones, in place."""
    for old, new in model.renamed_weights.items():
        for name in [name for name in tensors if name.startswith(prefix + old)]:
            tensors[prefix + new + name.removeprefix(prefix + old)] = tensors.pop(name)


def _own(folder: Path, keywords: dict[str, Any]) -> LatentActionModel:
    values = read_json(folder / "config.json")
    if not isinstance(values, dict) or not isinstance(values.get("lam"), dict) or "kind" not in values["lam"]:
        raise UserError(
            f"{folder} must be a latent action model, got another checkpoint. Give the folder of a train-lam "
            "run."
        )
    with naming(folder / "config.json"):
        config = from_dict(LAMS.get(str(values["lam"]["kind"])), {**values["lam"], **keywords}, "lam")
        actions = from_dict(ActionSpace, values["actions"], "actions") if values.get("actions") else None
    tensors = load_tensors(folder / WEIGHTS)
    with torch.device("meta"):  # sizes that exceed the file fail before memory is allocated
        outline = config.build(actions)
        _rename_weights(outline, tensors)
        require_weights(outline, tensors, folder / WEIGHTS)
    model = config.build(actions)
    load_weights(model, tensors, folder / WEIGHTS)
    spec = load_spec(folder / "spec.json")
    for name in ("model", "tokens", "token_dim", "codebook_size", "resolution", "robot_actions"):
        if (found := getattr(spec, name)) != (own := getattr(model.spec, name)):
            raise UserError(
                f"{folder / 'spec.json'}: {name} must be {own!r}, got {found!r}. The file belongs to "
                f"another model."
            )
    model.spec = replace(spec, weights=weights_hash(folder / WEIGHTS))
    return model


def _published(path: Path, keywords: dict[str, Any]) -> LatentActionModel:
    """Return the model of the first registered config that reads this published format."""
    known: set[str] = set()
    for name in LAMS.names():
        read: Any = LAMS.get(name).read_published
        takes = set(inspect.signature(read).parameters) - {"path"}
        known |= takes
        if (model := read(path, **{k: v for k, v in keywords.items() if k in takes})) is None:
            continue
        if unknown := sorted(keywords.keys() - takes):
            raise UserError(
                f"load_lam has no setting {unknown[0]!r} for a published "
                f"{name}{did_you_mean(unknown[0], takes)}"
            )
        model.spec = replace(model.spec, weights=save_tensors(None, model.state_dict()))
        return model
    if unknown := sorted(keywords.keys() - known):
        raise UserError(f"unknown setting {unknown[0]!r} of load_lam{did_you_mean(unknown[0], known)}")
    what = "is a file" if path.is_file() else "holds no config.json"
    raise UserError(
        f"{path} {what} and is not a published villa-X, LAPO or LAPA checkpoint. Give the folder of a "
        f"finished run or one of those."
    )


def batched(
    frames: UInt8[Tensor, "*b t c h w"], valid: Bool[Tensor, "*b t"] | None, last: bool, channels: int = 3
) -> tuple[UInt8[Tensor, "b t c h w"], Bool[Tensor, "b t"]]:
    """Return clips as a batch (one clip becomes a batch of one) and which frames are valid (default: all).

    Raises:
        UserError: frames have the wrong type or shape, or `last` is set and there is no transition.
    """
    if frames.dtype != torch.uint8 or frames.ndim not in (4, 5) or frames.shape[-3] != channels:
        raise UserError(
            f"frames must be uint8 [(batch,) time, {channels}, height, width], got "
            f"{str(frames.dtype).removeprefix('torch.')} {list(frames.shape)}."
        )
    if frames.ndim == 4:
        frames, valid = frames[None], None if valid is None else valid[None]
    if frames.shape[1] < 1 + last:
        raise UserError(f"a clip must have at least two frames for a transition, got {frames.shape[1]}.")
    if valid is None:
        valid = torch.ones(frames.shape[:2], dtype=torch.bool, device=frames.device)
    return frames, valid


def require_states(
    model: LatentActionModel, states: Float32[Tensor, "*b t s"] | None
) -> Float32[Tensor, "b t s"] | None:
    """Return robot states as a batch; None if the model does not use them.

    Raises:
        UserError: the model uses states, and they are missing or have the wrong size.
    """
    if not model.state_size:
        return None
    size = 0 if states is None else states.shape[-1]
    if states is None or size != model.state_size:
        raise UserError(states_message(model.spec, model.state_size, size))
    return states[None] if states.ndim == 2 else states


def states_message(spec: LatentActionSpec, expected: int, got: int, source: str = "the frames") -> str:
    """Return the message for data whose robot state is missing (size 0) or has the wrong size."""
    found = f"{got} values" if got else "none"
    return (
        f"observation.state of {source} must have the {expected} values that the LAM {spec.model} uses, got "
        f"{found}. Give data with that state, or a LAM that uses only images."
    )


def transition_windows(
    frames: UInt8[Tensor, "*b t c h w"],
    valid: Bool[Tensor, "*b t"] | None,
    context: int,
    last: bool = False,
    channels: int = 3,
) -> tuple[UInt8[Tensor, "n i c h w"], Bool[Tensor, "b t2"]]:
    """Cut clips into one window per transition: `context` older frames, the current one, the next one.

    Returns:
        Windows ``[b * (t - 1), context + 2, c, h, w]`` and whether both frames of each transition are valid
        ``[b, t - 1]``; with `last`, one window per clip.
    """
    frames, valid = batched(frames, valid, last, channels)
    steps, transition_valid = window_steps(valid, context, last)
    return at_steps(frames, steps), transition_valid


def window_steps(
    valid: Bool[Tensor, "b t"], context: int, last: bool
) -> tuple[Int64[Tensor, "b t2 i"], Bool[Tensor, "b t2"]]:
    """Return the frames of a clip in each transition's window, and whether the transition is valid.

    Context that is not valid, or older than the clip, is replaced by the first frame of the current run of
    valid frames.

    Index spaces: `steps` [t] counts a clip's frames; `now` [t2] are those that start a transition;
    `first_valid[b, t]` is the start of the run of valid frames that contains t; result[b, t2, i] is the
    frame at offset i - context from now[t2], not before first_valid.
    """
    t = valid.shape[1]
    steps = torch.arange(t, device=valid.device)
    first_valid = torch.where(valid, 0, steps + 1).cummax(1).values.clamp(max=t - 1)
    now = steps[t - 2 if last else 0 : t - 1]
    offsets = torch.arange(-context, 2, device=valid.device)
    window = torch.maximum(now[:, None] + offsets, first_valid[:, now, None])
    return window, valid[:, now] & valid[:, now + 1]


def at_steps(x: Shaped[Tensor, "b t *s"], steps: Int64[Tensor, "b t2 i"]) -> Shaped[Tensor, "n i *s"]:
    """Gather clips at the steps of windows, one row per window."""
    first = torch.arange(0, x.shape[0] * x.shape[1], x.shape[1], device=x.device)[:, None, None]
    rows = x.flatten(0, 1).index_select(0, (first + steps).flatten())
    return rows.unflatten(0, (-1, steps.shape[2]))


def normalize_frames(frames: UInt8[Tensor, "b t c h w"], size: int) -> Float[Tensor, "b t c size size"]:
    """Return frames in -0.5..0.5, resized to `size` (bilinear, antialiased, rounded to whole gray levels)."""
    x = frames
    if x.shape[-2:] != (size, size):
        flat = x.flatten(0, 1).float()
        x = (
            F.interpolate(flat, (size, size), mode="bilinear", antialias=True)
            .round()
            .unflatten(0, x.shape[:2])
        )
    return x.to(torch.float32, copy=True).div_(255).sub_(0.5)


def action_loss(
    predicted: Float[Tensor, "b a"], action: Shaped[Tensor, "b *a"], labeled: Bool[Tensor, " b"]
) -> Float[Tensor, ""]:
    """Return the mean loss over the labeled rows of a batch, 0 if there are none.

    Cross-entropy for classes ``[b]``, squared error for vectors ``[b, a]``.
    """
    if action.is_floating_point():
        error = (predicted.float() - action).square().mean(1)
    else:
        error = F.cross_entropy(predicted.float(), action, reduction="none")
    return (error * labeled).sum() / labeled.sum().clamp(min=1)
