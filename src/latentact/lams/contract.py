"""What a latent action model is, and how one is loaded."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, Shaped, UInt8
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
from latentact.quantizers.quantizer import Quantized
from latentact.registry import Registry
from latentact.types import ActionSpace, Clip, LatentActions, LatentActionSpec


class LamConfig(Protocol):
    """Settings of a LAM; a frozen dataclass whose field `kind` is its registered name.

    Where others published such models, it may have a classmethod
    ``read_published(path, *, keyword=default, ...) -> LatentActionModel | None`` for `load_lam`: None where
    the file or folder is not of their format, a UserError where it is and is broken.
    """

    kind: str

    def build(self, actions: ActionSpace | None = None) -> LatentActionModel:
        """Return a model with random weights; `actions` is what a joint action head predicts."""
        ...


LAMS: Registry[type[LamConfig]] = Registry("lam", "latentact.lams.models", "latentact.lams")


class LatentActionModel(nn.Module, ABC):
    """A latent action model: `encode` is inverse dynamics, `predict` forward dynamics.

    Attributes:
        spec: what its latent actions mean.
        context: frames before the transition that it looks at.
        stretch: transitions that `encode` gives of a clip of `stretch + 1` frames for about the price of one;
            long videos are then cut into such clips, which overlap by a frame and get no context.
        horizon: frames after the current one that `loss` wants; the current one is at index `context`.
        state_size: numbers of the robot state that `encode` wants of every frame as `state`; 0: it looks at
            frames alone.
        sees: whether it looks at frames, not only at the robot's state.
        generative: whether it has forward dynamics, that is whether `predict` works.
        actions: what its joint action head predicts, or None.
    """

    spec: LatentActionSpec
    context: int = 0
    stretch: int = 1
    horizon: int = 1
    state_size: int = 0
    sees: bool = True
    generative: bool = True
    actions: ActionSpace | None = None

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def encode(
        self,
        frames: UInt8[Tensor, "*b t c h w"],
        valid: Bool[Tensor, "*b t"] | None = None,
        last: bool = False,
    ) -> LatentActions:
        """Return the latent action of every transition of every clip, any height and width.

        One clip without a batch axis becomes a batch of one. Clips of unequal length are padded and `valid`
        is False there. Context older than the clip repeats its first frame, as an environment would at its
        start, or is not there, where the model takes windows of any length. With `last` only each clip's
        last transition is returned (t - 1 becomes 1) and only that one is computed. A single frame has no
        transition.
        """

    @abstractmethod
    def predict(
        self, frames: UInt8[Tensor, "b t c h w"], vectors: Float[Tensor, "b k d"]
    ) -> UInt8[Tensor, "b c h2 w2"]:
        """Return the frame that follows the last of `frames`, at the model's resolution."""

    @abstractmethod
    def loss(self, clip: Clip) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the training loss of a batch and what to log about it."""

    def _new_spec(
        self,
        resolution: int,
        *,
        tokens: int,
        token_dim: int,
        codebook_size: int | None,
        robot_actions: bool = False,
    ) -> LatentActionSpec:
        """Return the spec of a model that knows neither camera nor rate yet; training tells both."""
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

    def _to_latent_actions(self, latent: Quantized, real: Bool[Tensor, "b t"]) -> LatentActions:
        """Return what left the bottleneck, transition after transition, in the shapes of the spec."""
        shape = (*real.shape, self.spec.tokens, self.spec.token_dim)
        return LatentActions(
            vectors=latent.vectors.reshape(shape),
            continuous=latent.continuous.reshape(shape),
            codes=None if latent.codes is None else latent.codes.reshape(shape[:3]),
            valid=real,
        )

    def set_action_stats(self, actions: Shaped[Tensor, "n *a"]) -> None:
        """Take mean and deviation of continuous actions from the labeled steps, if any are predicted."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json`, `model.safetensors` and `spec.json`, whole or not at all."""
        with atomic_dir(Path(folder)) as partial:
            self.write(partial)

    def write(self, folder: Path) -> None:
        """Write the checkpoint's files into an existing folder and put the weights' hash into the spec."""
        weights = save_tensors(folder / WEIGHTS, self.state_dict())
        self.spec = replace(self.spec, weights=weights)
        self.spec.save(folder / "spec.json")
        actions = to_dict(self.actions) if self.actions else None
        write_json(folder / "config.json", {"lam": to_dict(self.config), "actions": actions})

    def push_to_hub(self, repo_id: str, private: bool | None = None) -> str:
        """Upload the checkpoint to the Hugging Face hub and return its address."""
        return push_folder(self.write, repo_id, private)

    @classmethod
    def from_pretrained(cls, where: str | Path) -> LatentActionModel:
        """Load a model that `save_pretrained` wrote; see `load_lam`."""
        return load_lam(where)


HUB_FILES = {
    "microsoft/villa-x": ("lam/*",),
    "latent-action-pretraining/LAPA-7B-openx": ("laq_openx.pt",),
}
"""Which files of a published repository are its latent action model; others hold much larger models too."""


def load_lam(where: str | Path, device: str = "cpu", **keywords: Any) -> LatentActionModel:
    """Load a latent action model of ours or a published one, in evaluation mode.

    Args:
        where: folder, file or hub id: what `save_pretrained` wrote, or a checkpoint of villa-X, LAPO or LAPA.
        device: where to put it.
        keywords: settings that replace what the checkpoint says (`window="chunked"`), or say what it does not
            (`image_size=256`).

    Raises:
        UserError: it is missing, truncated, of another model or not a checkpoint; nothing in it is executed.
    """
    require_device(device)
    path = resolve_path(where, *([HUB_FILES[str(where)]] if str(where) in HUB_FILES else []))
    with settings_of(path):
        model = _own(path, keywords) if (path / "config.json").is_file() else _published(path, keywords)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{path} is damaged: {name!r} holds numbers that are not finite.")
    return model.eval().to(device)


def _own(folder: Path, keywords: dict[str, Any]) -> LatentActionModel:
    values = read_json(folder / "config.json")
    if not isinstance(values, dict) or not isinstance(values.get("lam"), dict) or "kind" not in values["lam"]:
        raise UserError(f"{folder} is not a latent action model; give the folder of a train-lam run.")
    with naming(folder / "config.json"):
        config = from_dict(LAMS.get(str(values["lam"]["kind"])), {**values["lam"], **keywords}, "lam")
        actions = from_dict(ActionSpace, values["actions"], "actions") if values.get("actions") else None
    tensors = load_tensors(folder / WEIGHTS)
    with torch.device("meta"):  # settings that ask for more than the file holds are refused before memory is
        require_weights(config.build(actions), tensors, folder / WEIGHTS)
    model = config.build(actions)
    load_weights(model, tensors, folder / WEIGHTS)
    spec = load_spec(folder / "spec.json")
    for name in ("model", "tokens", "token_dim", "codebook_size", "resolution", "robot_actions"):
        if (said := getattr(spec, name)) != (real := getattr(model.spec, name)):
            raise UserError(
                f"{folder / 'spec.json'} says {name} {said!r} and the model has {real!r}; it belongs to "
                f"another model."
            )
    model.spec = replace(spec, weights=weights_hash(folder / WEIGHTS))
    return model


def _published(path: Path, keywords: dict[str, Any]) -> LatentActionModel:
    """Ask every registered config that reads a published format; one that does not know it returns None."""
    known: set[str] = set()
    for name in LAMS.names():
        if (read := getattr(LAMS.get(name), "read_published", None)) is None:
            continue
        takes = set(inspect.signature(read).parameters) - {"path"}
        known |= takes
        if (model := read(path, **{k: v for k, v in keywords.items() if k in takes})) is None:
            continue
        if strange := sorted(keywords.keys() - takes):
            raise UserError(
                f"load_lam got {strange[0]!r} for a published {name}{did_you_mean(strange[0], takes)}"
            )
        model.spec = replace(model.spec, weights=save_tensors(None, model.state_dict()))
        return model
    if strange := sorted(keywords.keys() - known):
        raise UserError(f"load_lam got an unknown setting {strange[0]!r}{did_you_mean(strange[0], known)}")
    what = "is a file" if path.is_file() else "holds no config.json"
    raise UserError(
        f"{path} {what} and is no published villa-X, LAPO or LAPA checkpoint either; give the folder of a "
        f"finished run or one of those."
    )


def batched(
    frames: UInt8[Tensor, "*b t c h w"], valid: Bool[Tensor, "*b t"] | None, last: bool, channels: int = 3
) -> tuple[UInt8[Tensor, "b t c h w"], Bool[Tensor, "b t"]]:
    """Return clips as a batch (one clip becomes a batch of one) and which frames are real (default: all).

    Raises:
        UserError: frames are of another type or shape, there is none at all, or the last transition of a
            single frame is asked for.
    """
    if frames.dtype != torch.uint8 or frames.ndim not in (4, 5) or frames.shape[-3] != channels:
        raise UserError(
            f"frames are {str(frames.dtype).removeprefix('torch.')} {list(frames.shape)}; wanted uint8 "
            f"[(batch,) time, {channels}, height, width]."
        )
    if frames.ndim == 4:
        frames, valid = frames[None], None if valid is None else valid[None]
    if frames.shape[1] < 1 + last:
        raise UserError(f"a clip of {frames.shape[1]} frame(s) has no transition; give at least two frames.")
    if valid is None:
        valid = torch.ones(frames.shape[:2], dtype=torch.bool, device=frames.device)
    return frames, valid


def pairs(
    frames: UInt8[Tensor, "*b t c h w"],
    valid: Bool[Tensor, "*b t"] | None,
    context: int,
    last: bool = False,
    channels: int = 3,
) -> tuple[UInt8[Tensor, "n i c h w"], Bool[Tensor, "b t2"]]:
    """Cut clips into one window per transition: `context` older frames, the current one, the next one.

    Returns:
        Windows ``[b * (t - 1), context + 2, c, h, w]`` and whether both frames of each transition are real
        ``[b, t - 1]``; with `last`, one window per clip.
    """
    frames, valid = batched(frames, valid, last, channels)
    steps, real = window_steps(valid, context, last)
    return at_steps(frames, steps), real


def window_steps(
    valid: Bool[Tensor, "b t"], context: int, last: bool
) -> tuple[Int64[Tensor, "b t2 i"], Bool[Tensor, "b t2"]]:
    """Return which frames of its clip make each transition's window, and whether the transition is real.

    Context that is not real, or older than the clip, is the first real frame of the stretch instead.
    """
    t = valid.shape[1]
    steps = torch.arange(t, device=valid.device)
    stretch = torch.where(valid, 0, steps + 1).cummax(1).values.clamp(max=t - 1)
    now = steps[t - 2 if last else 0 : t - 1]
    offsets = torch.arange(-context, 2, device=valid.device)
    places = torch.maximum(now[:, None] + offsets, stretch[:, now, None])
    return places, valid[:, now] & valid[:, now + 1]


def at_steps(x: Shaped[Tensor, "b t *s"], steps: Int64[Tensor, "b t2 i"]) -> Shaped[Tensor, "n i *s"]:
    """Return what clips hold at the steps of windows, window after window."""
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
    """Return the loss over the labeled rows of a batch, 0 where there is none.

    Cross-entropy for classes ``[b]``, squared error for vectors ``[b, a]``.
    """
    if action.is_floating_point():
        error = (predicted.float() - action).square().mean(1)
    else:
        error = F.cross_entropy(predicted.float(), action, reduction="none")
    return (error * labeled).sum() / labeled.sum().clamp(min=1)
